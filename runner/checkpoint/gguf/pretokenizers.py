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
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
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
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _named(names: str, entry: PreTokenizer) -> dict[str, PreTokenizer]:
    """The same entry under each of the names, which are separated by spaces."""
    return dict.fromkeys(names.split(), entry)


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **_named("gpt-2 phi-2 olmo mpt exaone4 gigachat mellum", PreTokenizer((_GPT2,))),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer((r"\p{N}", _GPT2))),
    **_named("llama-bpe llama3 llama-v3 falcon3 lfm2 pixtral", PreTokenizer((_LLAMA3,), ignore_merges=True, bos=True)),
    **_named("smaug-bpe dbrx chatglm-bpe", PreTokenizer((_LLAMA3,))),
    **_named("glm4", PreTokenizer((_LLAMA3,), ignore_merges=True)),
    **_named("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan", PreTokenizer((_QWEN2,))),
    **_named("tekken", PreTokenizer((_TEKKEN,), ignore_merges=True, bos=True)),
    **_named("gpt-4o", PreTokenizer((_GPT4O,))),
    **_named("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    **_named(
        "deepseek-llm",
        PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")),
    ),
    **_named("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    **_named("deepseek-v3 hunyuan-dense", PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3))),
}
"""The known pre-tokenizers, by `tokenizer.ggml.pre`."""
