"""Texts, chat templates and chats that the tokenizer fixtures are trained on and tried with. All written for this."""

from __future__ import annotations

from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris.",
    "It was the time of the year when the river rises and the boats are taken to the other side.",
    "  def add(a, b):\n    return a + b\n\n  print(add(1, 2), add(10, 200))\n",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 100 1000 2024 3.14159 -5 1e-3",
    "I'm sure they're here, we've seen that she'd come; he'll go, isn't it?",
    "Größe, naïve café, señor, žluťoučký kůň, Ελληνικά, привет мир",
    "日本語のテキスト。中文文本也在这里。한국어 문장입니다.",
    "user assistant system tool the answer question list of things that there with this from have",
    "Once upon a time there was a small house near the forest where the children played in the morning.",
] * 4
TEXTS = [
    "",
    " ",
    "  two leading spaces",
    "trailing spaces  ",
    "Hello, world!",
    "hello , world . it 's fine , is n't it ?",
    "The capital of France is Paris.",
    "line one\nline two\r\n\tindented\n\n\nend\n",
    "I'm, you're, WE'VE, he'd",
    "1234567890 3.14 1,000,000",
    "Größe naïve café Ελληνικά привет",
    "日本語のテキスト。中文。한국어",
    "emoji 😀 family 👨‍👩‍👧‍👦 flag 🇫🇷 skin 👍🏽",
    "e\u0301 combining, \u200bzero width, \u00a0no-break, \u3000ideographic",
    "<s>not a token</s> <unk>",
    "<|im_start|>user\nhi<|im_end|>",
    "<|begin_of_text|><|eot_id|> in text",
    "▁ the metaspace itself ▁▁",
    "\x00\x01\x7f control",
    "a" * 40,
    "def f(x):\n    return x ** 2\n",
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ETAOIN",
    " \n\t.,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+`~0123456789",
    "the quick of and \n  in to is",
    "äöüßéèñçžůαβγδжщыэ日本語中文한국어▁",
    "😀👍🏽👨\u200d👩🇫🇷\ufe0f\u0301\u00a0\u200b",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and tools %}
    {{- "You have these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'assistant' and 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TOOL_USE = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}{% for m in messages %}"
    "{{ m.role }}: {{ m.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "What is the capital of France?"}
ASSISTANT = {"role": "assistant", "content": "  The capital of France is Paris. "}
SYSTEM = {"role": "system", "content": "You answer shortly. "}
NASTY = {"role": "user", "content": "<|im_end|> <|eot_id|></s> {{ 7 * 7 }} 👨‍👩‍👧\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & later, in 'a' city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DATE = {"date_string": "01 Sep 2026"}
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {"add_generation_prompt": True, **DATE}),
    ([USER], {"add_generation_prompt": False, **DATE}),
    ([SYSTEM, USER], {"add_generation_prompt": True, **DATE}),
    ([USER, ASSISTANT, USER], {"add_generation_prompt": True, **DATE}),
    ([SYSTEM, USER, ASSISTANT, NASTY], {"add_generation_prompt": True, **DATE}),
    ([NASTY, ASSISTANT], {"add_generation_prompt": False, **DATE}),
    ([USER], {"add_generation_prompt": True, "tools": TOOLS, **DATE}),
    ([USER, CALL], {"add_generation_prompt": False, "tools": TOOLS, **DATE}),
    ([USER, USER], {"add_generation_prompt": True, **DATE}),
]
