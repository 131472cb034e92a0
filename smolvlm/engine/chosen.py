"""What a step has chosen, brought to the host."""

from __future__ import annotations

from collections import abc

from torch import Tensor

from smolvlm.engine.sequence import Sequence, Token
from smolvlm.sampling import top_logprobs

Chosen = list[Token]  # one per sequence


def read_tokens(chosen: Tensor, logits: Tensor, sequences: list[Sequence], rows: abc.Sequence[int]) -> Chosen:
    """The tokens of `sequences`, which sit in these rows of `chosen` [2, B] and of logits [B, V].

    `chosen` is float32, token ids (it holds every one exactly) above log-probabilities: one tensor, one wait.
    """
    token_ids, logprobs = chosen.tolist()
    counts = [0] * len(token_ids)
    for row, sequence in zip(rows, sequences, strict=True):
        counts[row] = sequence.params.top_logprobs
    top = top_logprobs(logits, counts) if any(counts) else [()] * len(counts)
    return [Token(int(token_ids[row]), logprobs[row], top[row]) for row in rows]
