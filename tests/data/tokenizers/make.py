"""Writes the tokenizers and expected values beside this file.

    python tests/data/tokenizers/make.py

with transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3 (scripts/fixtures/requirements-oracle.txt):

- `chatml/`: byte-level BPE with NFC, a BOS, special tokens with and without `rstrip`, added tokens that are not
  special, two named templates in tokenizer_config.json.
- `llama/`: tokenizer.model alone in the oldest layout: special_tokens_map.json, added_tokens.json, `legacy`, byte
  fallback, chat_template.jinja and one more in additional_chat_templates/.
- `expected.json` in each: ids and texts; `templates.json`: ten templates with chats and what transformers renders.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
SEED = 7
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "the quick brown fox jumps over the lazy dog and the other dog",
    "def add(a, b):\n    return a + b\n",
    "I'm sure they're here; we've seen 10 of 2024, 3.14 and user assistant system.",
    "Größe naïve café señor žluťoučký привет мир Ελληνικά",
    "日本語のテキスト。中文文本。한국어 문장",
] * 5
PARTS = [
    *"abcdefgh XYZ", " ", "  ", "\n", "\r\n", "\t", "the", " capital", "I'm", "10", "2024", "ß", "é",
    "e\u0301", "日本", "한국", "😀", "👨‍👩‍👧", "🇫🇷", "\u200d", "\u00a0", "▁", "<s>", "</s>", "<|im_end|>",
    "<|im_start|>", "<think>", "<unk>", "<0x0A>", "\x00",
    "<extra>", "<pad>", "<|eot|>", " <|eot|> ",
]  # fmt: skip
MACROS = """{%- macro parts(content) -%}
    {%- if content is string -%}{{- content | trim -}}
    {%- else -%}{%- for part in content if part.type == 'text' -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}\
{{ raise_exception('Unknown role ' + message.role) }}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ parts(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "Functions:" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == 'user' and not message.content.startswith('<answer>') %}\
{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is defined and message.content is not none else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and thought %}\
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<call>' }}{{- call.function.name }}{{- call.function.arguments | tojson(indent=2) }}{{- '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "instruct": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set first = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set first = false %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% set content = message['content'] %}"
        "{% if loop.index0 == 0 and first is not false %}"
        "{% set content = '<<' + first + '>>\\n' + content %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "macros": MACROS,
    "tools": TOOLS,
    "blocks": (
        "{{ bos_token }}\n{% for message in messages %}\n    {% if message.role == 'system' %}\n"
        "        {% continue %}\n"
        "    {% endif %}\n{{ message.role | upper }}: {% generation %}{{ message.content }}{% endgeneration %}\n\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}\n"
    ),
    "dates": (
        "{{ strftime_now('%Y') | length }}{{ '|' }}{{ date_string | default('none') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }}{{ '\\n' }}{{ tools | tojson(indent=4, sort_keys=true) }}"
        "{{ messages[0] | tojson(ensure_ascii=true) }}{{ messages | tojson(separators=(',', ':')) }}"
    ),
    "filters": (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | join(' / ') }}"
        "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}"
        "{{ (messages | first).role | capitalize | center(20) }}"
        "{{ '%s-%03d' % (messages[-1].role, 7) }}{{ '{:>6}|{x!r}'.format(3, x='é') }}{{ [3, 1, 2] | sort | last }}"
        "{{ messages | groupby('role') | map('first') | join(',') }}"
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ 7 // 2 }}{{ 2 ** 10 }}"
        "{{ dict(a=1, b=[1, 2]).items() | list }}"
        "{{ 'x' * 3 }}{{ 'a\\nb' | indent(2) }}{{ 3.14159 | round(2) }}{{ 'é' | e }}"
    ),
    "scopes": (
        "{% set ns = namespace(n=0, text='') %}{% for m in messages recursive %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.text = ns.text ~ loop.index ~ m.role[:2] ~ m.content[::-1] %}{{ loop.cycle('odd', 'even') }}"
        "{% endfor %}{% set block %}[{{ ns.n }}]{% endset %}{{ block }}{{ ns.text }}"
        "{% filter upper %}up{{ ns.n }}{% endfilter %}"
        "{% call(x) wrap(1) %}{{ x }}{% endcall %}"
    ).replace("{% set ns =", "{% macro wrap(y) %}<{{ caller(y + 1) }}>{% endmacro %}{% set ns =", 1),
    "spaces": (
        "  {% if true %}\n  x\n  {%- endif %}\n\n{{ messages[0].content }}  \n{# gone #}\n"
        "\t{% for m in messages -%}\n {{ m.role }}\n{% endfor %}\nend\n\n"
    ),
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Sky <now> & later, in 'a' city: \"é\" 日本",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": "  What is the capital?\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {"add_generation_prompt": True}),
    (
        [{"role": "system", "content": "Be <short>. "}, USER],
        {"add_generation_prompt": True, "date_string": "1 Sep 2026"},
    ),
    (
        [USER, {"role": "assistant", "content": " Paris. "}, USER],
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis 🇫🇷"}], {"enable_thinking": True}),
    ([USER, {"role": "assistant", "content": "Paris", "reasoning": "easy"}, USER], {}),
    ([{"role": "system", "content": "s"}, USER, CALL, {"role": "tool", "content": "clear"}], {"tools": [TOOL]}),
    ([USER, {"role": "assistant", "content": "It is "}], {"continue_final_message": True}),
    ([{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}], {}),
    ([{"role": "developer", "content": "x", "name": None}], {"add_generation_prompt": True}),
    ([USER, USER], {}),
]


def write(path: Path, value: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, **options) + "\n", encoding="utf-8")


def chatml(directory: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [AddedToken(s, special=True, normalized=False) for s in ("<|bos|>", "<|im_start|>", "<|im_end|>")]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken("<|eot|>", special=True, normalized=False, rstrip=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken(s, normalized=False) for s in ("<think>", "</think>", "a b é")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    write(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,  # must not matter beside a tokenizer.json
            "bos_token": {"__type": "AddedToken", "content": "<|bos|>", **plain},
            "eos_token": "<|im_end|>",
            "image_token": "<|eot|>",
            "chat_template": [
                {"name": "default", "template": TEMPLATES["macros"]},
                {"name": "tool_use", "template": TEMPLATES["tools"]},
            ],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                "0": {"content": "<|bos|>", **plain},
                "1": {"content": "<|im_start|>", **plain},
                "2": {"content": "<|im_end|>", **plain},
                "300": {"content": "<|eot|>", **plain, "lstrip": True, "rstrip": True},
                "304": {"content": "<extra>", **plain, "special": False, "normalized": True, "single_word": True},
            },
        },
        indent=1,
    )


def llama(directory: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=360, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    write(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True},
    )
    pad = {"content": "<pad>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    write(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": pad})
    write(directory / "added_tokens.json", {"<|im_end|>": 360, "<pad>": 361, "<extra>": 362})
    (directory / "chat_template.jinja").write_text(TEMPLATES["instruct"], encoding="utf-8")
    (directory / "additional_chat_templates").mkdir(exist_ok=True)
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATES["json"], encoding="utf-8")


def texts() -> list[str]:
    chooser = random.Random(SEED)
    fixed = [
        "",
        " ",
        "Hello",
        " Hello",
        "  Hello",
        "\n",
        "a<|im_end|> b",
        "Hello</s>world",
        "<s><s>",
        "a b é",
        "x<extra>y <extra>",
    ]
    return fixed + ["".join(chooser.choices(PARTS, k=chooser.randint(1, 8))) for _ in range(490)]


def attempt(tokenizer: Any, messages: Any, options: Any) -> str | None:
    """The rendered text; None where the template refuses or fails."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:
        return None


def expected(directory: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = []
    for text in texts():
        ids = tokenizer.encode(text)
        rows.append(
            {
                "text": text,
                "ids": ids,
                "plain": tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
                "decoded": tokenizer.decode(ids, skip_special_tokens=True),
                "decoded_all": tokenizer.decode(ids, skip_special_tokens=False),
            }
        )
    chats = []
    for messages, options in CHATS:
        text = attempt(tokenizer, messages, options)
        ids = None if text is None else tokenizer.encode(text, add_special_tokens=False)
        chats.append({"messages": messages, "options": options, "text": text, "ids": ids})
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__, "seed": SEED}
    size = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "size": len(tokenizer)}
    write(directory / "expected.json", {"recipe": versions, "special": size, "rows": rows, "chats": chats})
    return tokenizer


def main() -> None:
    chatml(HERE / "chatml")
    llama(HERE / "llama")
    tokenizer = expected(HERE / "chatml")
    expected(HERE / "llama")
    cases = []
    for name, source in TEMPLATES.items():
        texts = [attempt(tokenizer, messages, {**options, "chat_template": source}) for messages, options in CHATS]
        cases.append({"name": name, "source": source, "texts": texts})
    chats = [{"messages": messages, "options": options} for messages, options in CHATS]
    write(HERE / "templates.json", {"chats": chats, "cases": cases})


if __name__ == "__main__":
    main()
