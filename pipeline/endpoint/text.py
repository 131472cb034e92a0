"""Tokens → text, as they come: whole characters only, stop strings cut off, white space at both ends held back.

The pieces of an answer put together are what `Processor.decode(…).strip()` makes of its tokens.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else the next from 256 on.

    Source: `bytes_to_unicode` of GPT-2's encoder, https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """The bytes that each token of a byte-level tokenizer stands for; none for special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()

    def __call__(self, token_id: int) -> bytes:
        """The token's part of the text; it may be a piece of a character."""
        added = self._added.get(token_id)
        return b"" if added is not None and added.special else self.shown(token_id)

    def shown(self, token_id: int) -> bytes:
        """The same for logprobs, where special tokens show by name."""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        table = _bytes_of_characters()
        return bytes(table[character] for character in self._tokenizer.id_to_token(token_id) or "")


class AnswerText:
    """The text of one answer. `push` gives what may be shown now; `is_stopped` once a stop string came up."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._begun = False
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that nothing later can change."""
        self._take(self._decoder.decode(self._token_bytes(token_id)))
        return self._release()

    def finish(self) -> str:
        """Return what was held back and belongs to the answer."""
        if not self.is_stopped:
            self._take(self._decoder.decode(b"", final=True))
        rest, self._held = self._held.rstrip(), ""
        return rest

    def _take(self, text: str) -> None:
        if self.is_stopped:
            return
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.is_stopped = True

    def _release(self) -> str:
        """Hold back white space, which may be the last, and what may be the beginning of a stop string."""
        end = len(self._held) - self._possible_stop()
        ready = self._held[:end].rstrip()
        self._held = self._held[len(ready) :]
        return ready

    def _possible_stop(self) -> int:
        if self.is_stopped:
            return 0
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((size for size in sizes if any(s.startswith(self._held[-size:]) for s in self._stop)), 0)


@dataclass(frozen=True)
class TokenLogprobs:
    """What OpenAI's API says about one token. Log-probabilities are natural logarithms."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def to_json(self, token_bytes: TokenBytes) -> dict[str, Any]:
        """Return it as an entry of `logprobs.content`."""
        alternatives = [_entry(token_bytes.shown(token_id), logprob) for token_id, logprob in self.top]
        return {**_entry(token_bytes.shown(self.token_id), self.logprob), "top_logprobs": alternatives}


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    # OpenAI's own way to say "nearly impossible", and JSON knows no infinity.
    return {"token": data.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}
