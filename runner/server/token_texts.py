"""Tokens as APIs show them beside log-probabilities: their text, and their bytes."""

from __future__ import annotations

import re

from runner.engine.sampler import Token
from runner.text.detokenizer import byte_alphabet
from runner.text.tokenizer import Tokenizer

LEAST = -9999.0
"""OpenAI's number for the logarithm of probability 0, since JSON has no infinity."""


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._alphabet = byte_alphabet()

    def text(self, token: int) -> str:
        """The text of one token by itself; an incomplete character is U+FFFD."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token."""
        text = self.text(token)
        piece = self.tokenizer.piece(token)
        if "\ufffd" not in text or piece is None:
            return text.encode()
        if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(found[1], 16)])
        if all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        return text.encode()

    def shown(self, token: int) -> str:
        """The text of a token, or where it is no whole character its bytes, as in `bytes:\\xe2\\x82`."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def bounded(logprob: float | None) -> float:
    """A log-probability as JSON can have it."""
    return LEAST if logprob is None or not logprob > LEAST else logprob


def entry(texts: TokenTexts, token: Token) -> dict[str, object]:
    """A token in the form of OpenAI's chat, with the likeliest ones in its place."""

    def one(index: int, logprob: float | None) -> dict[str, object]:
        return {"token": texts.text(index), "logprob": bounded(logprob), "bytes": list(texts.bytes_of(index))}

    top = [one(index, logprob) for index, logprob in token.top_logprobs or ()]
    return {**one(token.id, token.logprob), "top_logprobs": top}
