"""What steps have chosen, brought to the host."""

from __future__ import annotations

from collections import abc

from torch import Tensor

from smolvlm.engine.sequence import Sequence, Token
from smolvlm.sampling import top_logprobs

Chosen = list[list[Token]]  # the next tokens of each sequence, in order


def read_tokens(chosen: Tensor, logits: Tensor, sequences: list[Sequence], rows: abc.Sequence[int]) -> Chosen:
    """One token for each of `sequences`, which sit in these rows of `chosen` [2, B] and of logits [B, V].

    `chosen` is float32, token ids (it holds every one exactly) above log-probabilities: one tensor, one wait.
    """
    token_ids, logprobs = chosen.tolist()
    counts = [0] * len(token_ids)
    for row, sequence in zip(rows, sequences, strict=True):
        counts[row] = sequence.params.top_logprobs
    top = top_logprobs(logits, counts) if any(counts) else [()] * len(counts)
    return [[Token(int(token_ids[row]), logprobs[row], top[row])] for row in rows]


def read_answers(chosen: Tensor) -> Chosen:
    """The tokens of all rows of chosen [steps, 2, R], float32 on the host, one list a row."""
    token_ids = chosen[:, 0].long().T.tolist()
    logprobs = chosen[:, 1].T.tolist()
    return [[Token(*each) for each in zip(*row, strict=True)] for row in zip(token_ids, logprobs, strict=True)]
