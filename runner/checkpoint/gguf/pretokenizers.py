"""Pre-tokenizers by llama.cpp's names: how byte-level BPE cuts text into words before it merges within each word.

Source: the models' own tokenizer.json files, which llama.cpp's table (llama-vocab.cpp) follows. Each regex cuts the
pieces that the regex before it left; its matches and the text between them all become pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words.

    Attributes:
        patterns: regexes, applied one after another.
        ignore_merges: a word that is itself a token is taken whole, whatever the merges would make of it.
        bos: text starts with BOS unless the file says otherwise.
        composed: text is brought into Unicode's composed form (NFC) before, which llama.cpp leaves out.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    bos: bool = False
    composed: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]")
_MINICPM5 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
_JAIS2 = _LLAMA3.replace(
    r"\s+(?!\S)|\s+", "".join(rf"\s{{{count}}}(?!\S)|" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"\s"
)
_SEED = _QWEN2.replace(r"]+[\r\n]*|", r"\r\n]+|")
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = "|".join([_CASED % ("", ""), r"\p{N}", _REST])
_GPT4O = "|".join([_CASED % (_SUFFIX, _SUFFIX), r"\p{N}{1,3}", _REST])
_DEEPSEEK_LETTERS = (  # the cased letters; \x{...} where an editor's normalisation would change the character
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    r"Ὗ-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌῐ-\x{1fd3}ῖ-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃ"
    r"ↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_NO_PUNCTUATION = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPARK = _DEEPSEEK_V3.replace(r"]+[\r\n]*|\s*[\r\n]+|", r"]+|[\r\n]|")

DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
"""What llama.cpp takes where the file names none: not how any model was trained, so the ids are a guess."""


def _named(names: str, entry: PreTokenizer) -> dict[str, PreTokenizer]:
    """List a pre-tokenizer under each of its names, which are separated by spaces."""
    return dict.fromkeys(names.split(), entry)


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **_named(
        "gpt-2 phi-2 olmo mpt exaone4 gigachat mellum jina-es jina-de jina-v2-es jina-v2-de a.x-4.0 modern-bert jais "
        "trillion granite-docling",
        PreTokenizer((_GPT2,)),
    ),
    **_named("smollm starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer((r"\p{N}", _GPT2))),
    **_named("command-r", PreTokenizer((r"\p{N}", _GPT2), composed=True)),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 lfm2 pixtral midm-2.0 jina-v5-nano",
        PreTokenizer((_LLAMA3,), ignore_merges=True, bos=True),
    ),
    **_named("minicpm5", PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True)),
    **_named("jais-2", PreTokenizer((_JAIS2,))),
    **_named("smaug-bpe dbrx chatglm-bpe", PreTokenizer((_LLAMA3,))),
    **_named("glm4", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    **_named("qwen2", PreTokenizer((_QWEN2,), composed=True)),
    **_named("deepseek-r1-qwen stablelm2 megrez hunyuan kormo f2llmv2 solar-open grok-2", PreTokenizer((_QWEN2,))),
    **_named("qwen35", PreTokenizer((_QWEN35,), composed=True)),
    **_named("ufakzeka", PreTokenizer((_QWEN2.removeprefix("(?i:'s|'t|'re|'ve|'m|'ll|'d)|"),))),
    **_named("laguna", PreTokenizer((r"[^\n]+|\n+", _QWEN2))),
    **_named("seed-coder", PreTokenizer((_SEED,))),
    **_named("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    **_named("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    **_named("poro-chat bloom gpt3-finnish", PreTokenizer((_NO_PUNCTUATION,))),
    **_named("viking", PreTokenizer((_NO_PUNCTUATION, r"\p{N}"))),
    **_named("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    **_named("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, bos=True)),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    **_named("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    **_named(
        "deepseek-llm",
        PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")),
    ),
    **_named("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    **_named(
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    ),
    **_named("spark2_5", PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _SPARK, r"\p{N}"))),
    "default": DEFAULT,
}
"""The known pre-tokenizers, by `tokenizer.ggml.pre`."""
