"use strict";
// The chat of `runner serve`: one conversation, held in this page alone.
const $ = (id) => document.getElementById(id);
const { make } = Markdown;
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];
const messages = []; // {role, content, reasoning_content?}
let running = null; // the AbortController of the answer that comes

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function models() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) return show(true, "This server asks for an API key: enter it in the settings.");
  const { data } = await answer.json();
  $("model").replaceChildren(...data.map((each) => make("option", each.id)));
}

function show(open, note) {
  $("settings").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
  if (note) notice(note);
}

function notice(text) {
  const element = make("p", text);
  element.className = "error";
  element.setAttribute("role", "alert");
  $("chat").append(element);
  element.scrollIntoView({ block: "end" });
}

function button(text, action) {
  const element = make("button", text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

// An article for a message; `at` is its place in the conversation.
function article(message, at) {
  const body = make("div");
  body.className = "body";
  const tools = make("div");
  tools.className = "tools";
  const element = make("article", body, tools);
  element.className = message.role;
  if (message.role === "user") {
    body.textContent = message.content;
    tools.append(button("Edit", () => edit(at)));
  }
  $("chat").append(element);
  return { element, body, tools };
}

function draw() {
  $("chat").replaceChildren();
  messages.forEach((message, at) => {
    const made = article(message, at);
    if (message.role === "assistant") {
      fill(made.body, message);
      finish(made.tools, message);
    }
  });
}

function fill(body, message) {
  const parts = [];
  if (message.reasoning_content) {
    const open = body.querySelector("details")?.open ?? false;
    const details = make("details", make("summary", message.content ? "Reasoning" : "Reasoning …"), message.reasoning_content);
    details.open = open;
    parts.push(details);
  }
  parts.push(...Markdown.blocks(message.content));
  body.replaceChildren(...parts);
}

function finish(tools, message) {
  tools.replaceChildren(
    Markdown.copier(message.content),
    ...(messages.at(-1) === message ? [button("Regenerate", regenerate)] : []),
    make("span", message.note || ""),
  );
}

function edit(at) {
  if (running) return;
  const [message] = messages.splice(at);
  draw();
  $("text").value = message.content;
  $("text").focus();
}

function regenerate() {
  if (running) return;
  messages.pop();
  draw();
  answer();
}

function request() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...messages.map(({ role, content, reasoning_content }) => ({ role, content, ...(reasoning_content && { reasoning_content }) })),
    ],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("reasoning_effort").value) body.reasoning_effort = $("reasoning_effort").value;
  const schema = $("schema").value.trim();
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } };
  return body;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (let piece; !(piece = await reader.read()).done; ) {
    const lines = (held + piece.value).split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function answer() {
  let body;
  try {
    body = request();
  } catch (error) {
    return show(true, `The JSON schema is not JSON: ${error.message}`);
  }
  const message = { role: "assistant", content: "" };
  const { element, body: shown, tools } = article(message, messages.length);
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let first = 0;
  let failed = "";
  let drawn = false;
  const redraw = () => {
    drawn = false;
    const below = window.innerHeight + window.scrollY >= document.body.scrollHeight - 80;
    fill(shown, message);
    if (below) element.scrollIntoView({ block: "end" });
  };
  try {
    const sent = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!sent.ok) throw new Error((await sent.json()).error.message);
    for await (const chunk of events(sent.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta;
      if (delta?.content || delta?.reasoning_content) first ||= performance.now();
      message.content += delta?.content || "";
      if (delta?.reasoning_content) message.reasoning_content = (message.reasoning_content || "") + delta.reasoning_content;
      if (chunk.choices[0]?.finish_reason === "length") message.cut = true;
      if (chunk.usage) {
        const seconds = (performance.now() - first) / 1000;
        const { completion_tokens: made, prompt_tokens: read, prompt_tokens_details: details } = chunk.usage;
        message.note = `${made} tokens, ${(made / Math.max(seconds, 0.001)).toFixed(1)} per second; ` +
          `${details.cached_tokens} of ${read} reused${message.cut ? "; cut off by the length" : ""}`;
      }
      if (!drawn) {
        drawn = true;
        requestAnimationFrame(redraw);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") failed = error.message;
    else message.note = "stopped";
  }
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  if (message.content || message.reasoning_content) {
    messages.push(message);
    fill(shown, message);
    finish(tools, message);
  } else element.remove();
  if (failed) notice(failed);
  $("text").focus();
}

function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  messages.push({ role: "user", content: text });
  $("text").value = "";
  draw();
  answer();
}

$("ask").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", () => running?.abort());
$("toggle").addEventListener("click", () => show($("settings").hidden));
$("key").addEventListener("change", () => models().catch((error) => notice(error.message)));
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  draw();
  $("text").focus();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
models().catch((error) => notice(error.message));
