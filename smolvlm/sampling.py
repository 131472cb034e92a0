"""How the next token is chosen and when an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_REPETITION_WINDOW = 192
MAX_TOP_LOGPROBS = 20
NEARLY_GREEDY = 1e-4  # dividing by less than this overflows, and draws nothing but the likeliest token anyway


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is generated.

    temperature 0 is greedy; above 0 tokens are drawn from the smallest set whose probability reaches `top_p`, with
    random numbers of the answer's own (`seed`; None: a fresh one), so that an answer does not depend on its batch.

    The answer ends at an end-of-sequence token, after `max_new_tokens`, or, against the endless loops of small models,
    when its last `repetition_window` tokens repeat a cycle of at most a third of that length (None: never).
    `ignore_eos` switches both of these stops off: exactly `max_new_tokens` are generated, for measurements.

    `top_logprobs` (0 to 20) is how many of the likeliest tokens are reported beside each chosen one.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    repetition_window: int | None = DEFAULT_REPETITION_WINDOW
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or a positive number"
        )
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        window = self.repetition_window
        _require(window is None or window >= 3, "repetition_window", window, "at least 3, or None for no such rule")
        allowed = f"between 0 and {MAX_TOP_LOGPROBS}"
        _require(0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", self.top_logprobs, allowed)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < NEARLY_GREEDY


@dataclass(frozen=True)
class SamplingTensors:
    """The sampling parameters of a batch, float32 [B, 1] each; `None` in their place where all rows are greedy."""

    temperature: Tensor  # 1 in greedy rows
    top_p: Tensor
    greedy: Tensor  # bool [B, 1]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors | None:
        if all(each.is_greedy for each in params):
            return None
        rows = [(1.0 if each.is_greedy else each.temperature, each.top_p, float(each.is_greedy)) for each in params]
        temperature, top_p, greedy = torch.tensor(rows, device=device).unsqueeze(-1).unbind(1)
        return cls(temperature, top_p, greedy.bool())


def choose_tokens(logits: Tensor, sampling: SamplingTensors | None, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [B, V] → chosen token ids int64 [B] and their log-probabilities float32 [B].

    `uniform` [B, 1] in [0, 1) decides the drawn rows. The log-probabilities are those of the model itself, before
    temperature and top_p, so that they compare between answers.
    """
    logits = logits.float()
    tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
    if sampling is not None and uniform is not None:
        tokens = torch.where(sampling.greedy, tokens, draw(logits / sampling.temperature, sampling.top_p, uniform))
    logprobs = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.squeeze(1)


def top_logprobs(logits: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `counts[b]` likeliest tokens of each row of logits [B, V], with their log-probabilities, likeliest first.

    Waits for the device. Rows that want none cost nothing.
    """
    rows = [row for row, count in enumerate(counts) if count]
    logprobs = logits[rows].float().log_softmax(-1)  # [rows, V]
    values, token_ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    top: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    for row, ids, each in zip(rows, token_ids.tolist(), values.tolist(), strict=True):
        top[row] = tuple(zip(ids, each, strict=True))[: counts[row]]
    return top


def draw(logits: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Nucleus sampling by inverting the distribution function: logits [B, V], top_p and uniform [B, 1] → tokens [B, 1].

    Source: Holtzman et al., https://arxiv.org/abs/1904.09751: keep the likeliest tokens until their mass reaches top_p.
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    kept = probabilities.cumsum(-1) - probabilities < top_p  # the first is always kept
    mass = (probabilities * kept).cumsum(-1)
    rank = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    last_kept = kept.sum(-1, keepdim=True) - 1  # rounding must not step beyond the kept tokens
    return order.gather(1, torch.minimum(rank, last_kept))


def is_repeating(token_ids: Sequence[int], window: int) -> bool:
    """Whether the last `window` tokens are one cycle, at least three times over.

    The window is long on purpose: rules of dashes, dot leaders and rows of empty cells repeat too, but not for so long.
    """
    if len(token_ids) < window:
        return False
    tail = token_ids[-window:]
    last = tail[-1]
    return any(tail[-1 - period] == last and tail[period:] == tail[:-period] for period in range(1, window // 3 + 1))


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
