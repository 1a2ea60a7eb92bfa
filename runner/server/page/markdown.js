"use strict";
// Markdown as models write it, made of elements and text nodes alone: what a model writes is never parsed as HTML.
const Markdown = (() => {
  const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=\S)([^*]+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

  function make(name, ...children) {
    const element = document.createElement(name);
    element.append(...children);
    return element;
  }

  function inline(text) {
    const parts = [];
    for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
      parts.push(text.slice(0, found.index));
      if (found[2] !== undefined) parts.push(make("code", found[2]));
      else if (found[3] !== undefined) parts.push(make("strong", ...inline(found[3])));
      else if (found[4] !== undefined) parts.push(make("em", ...inline(found[4])));
      else {
        const link = make("a", found[5]);
        link.href = found[6];
        link.rel = "noopener noreferrer nofollow";
        link.target = "_blank";
        parts.push(link);
      }
    }
    parts.push(text);
    return parts;
  }

  // A button that copies a text. Pages of another machine's over plain HTTP, as on a phone, have no clipboard object.
  function copier(text) {
    const button = make("button", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      if (navigator.clipboard) await navigator.clipboard.writeText(text);
      else {
        const held = make("textarea");
        held.value = text;
        document.body.append(held);
        held.select();
        document.execCommand("copy");
        held.remove();
      }
      button.textContent = "Copied";
    });
    return button;
  }

  function code(lines) {
    const text = lines.join("\n");
    const block = make("div", copier(text), make("pre", make("code", text)));
    block.className = "block";
    return block;
  }

  function list(lines) {
    const ordered = /^\s*\d/.test(lines[0]);
    const element = make(ordered ? "ol" : "ul");
    if (ordered) element.start = parseInt(lines[0], 10) || 1;
    const depth = lines[0].search(/\S/);
    let item = [];
    const flush = () => {
      if (!item.length) return;
      const entry = make("li", ...inline(item[0].replace(/^\s*(?:[-*+]|\d+[.)])\s+/, "")));
      if (item.length > 1) entry.append(...blocks(item.slice(1).map((line) => line.slice(depth + 2))));
      element.append(entry);
      item = [];
    };
    for (const line of lines) {
      if (/^\s*(?:[-*+]|\d+[.)])\s/.test(line) && line.search(/\S/) <= depth + 1) flush();
      item.push(line);
    }
    flush();
    return element;
  }

  function table(lines) {
    const row = (line, name) =>
      make("tr", ...line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => make(name, ...inline(cell.trim()))));
    return make("table", row(lines[0], "th"), ...lines.slice(2).map((line) => row(line, "td")));
  }

  function blocks(lines) {
    const made = [];
    for (let at = 0; at < lines.length; ) {
      const start = at;
      const line = lines[at];
      const fence = /^\s*(```+|~~~+)/.exec(line);
      const head = /^(#{1,6})\s+(.*)/.exec(line);
      if (!line.trim()) at++;
      else if (fence) {
        do at++; while (at < lines.length && !lines[at].trim().startsWith(fence[1]));
        made.push(code(lines.slice(start + 1, at)));
        at++;
      } else if (head) {
        made.push(make(`h${Math.min(6, head[1].length + 2)}`, ...inline(head[2])));
        at++;
      } else if (/^\s*(?:[-*+]|\d+[.)])\s/.test(line)) {
        do at++; while (at < lines.length && (/^\s*(?:[-*+]|\d+[.)])\s/.test(lines[at]) || /^\s+\S/.test(lines[at])));
        made.push(list(lines.slice(start, at)));
      } else if (line.startsWith(">")) {
        do at++; while (at < lines.length && lines[at].startsWith(">"));
        made.push(make("blockquote", ...blocks(lines.slice(start, at).map((each) => each.replace(/^> ?/, "")))));
      } else if (line.includes("|") && /^[\s|:-]+$/.test(lines[at + 1] || "") && (lines[at + 1] || "").includes("-")) {
        do at++; while (at < lines.length && lines[at].includes("|"));
        made.push(table(lines.slice(start, at)));
      } else {
        do at++; while (at < lines.length && lines[at].trim() && !/^(\s*(```|~~~)|#{1,6}\s|>|\s*([-*+]|\d+[.)])\s)/.test(lines[at]));
        made.push(make("p", ...inline(lines.slice(start, at).join("\n"))));
      }
    }
    return made;
  }

  return { blocks: (text) => blocks(text.split("\n")), copier, make };
})();
