"""Tokens as they come out: order, log-probabilities, and listeners that fail or leave."""

import threading
from concurrent.futures import CancelledError, Future
from dataclasses import replace

import pytest
import torch
from fixture_types import MakeInput

from smolvlm import Engine, SamplingParams
from smolvlm.attention import packed_prefill
from smolvlm.engine import Completion, EngineLoop, Token
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=1900, ignore_eos=True)


def test_tokens_come_in_order_on_the_engine_thread_before_the_answer(loop: EngineLoop, question: ModelInput) -> None:
    heard: list[tuple[int, str, bool]] = []
    futures: list[Future[Completion]] = []
    submitted = threading.Event()

    def listen(token: Token) -> None:
        submitted.wait(30)
        heard.append((token.token_id, threading.current_thread().name, futures[0].done()))

    futures.append(loop.submit(question, GREEDY, on_token=listen))
    submitted.set()
    done = futures[0].result(30)
    assert heard == [(token_id, "smolvlm-engine", False) for token_id in done.token_ids]


def test_logprobs_are_those_of_the_model(loop: EngineLoop, engine: Engine, make_input: MakeInput) -> None:
    tokens: list[Token] = []
    question = make_input(text="Good morning.")
    silent = loop.submit(make_input(text="Good evening."), GREEDY)
    done = loop.submit(question, replace(GREEDY, top_logprobs=3), on_token=tokens.append).result(30)
    model, ids = engine.runner.model, torch.tensor(question.prompt_token_ids + done.token_ids[:-1])
    logprobs = model(model.embed(ids), packed_prefill((len(ids),), ids.device))[-8:].log_softmax(-1)
    for token, row in zip(tokens, logprobs, strict=True):
        values, best = row.topk(3)
        assert [token_id for token_id, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
    assert silent.result(30).output_tokens == 8


def test_only_batches_that_ask_pay_for_alternatives(
    loop: EngineLoop, question: ModelInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolvlm.engine.chosen.top_logprobs", lambda *_: pytest.fail("computed for nobody"))
    tokens: list[Token] = []
    loop.submit(question, GREEDY, on_token=tokens.append).result(30)
    assert [token.top for token in tokens] == [()] * 8


def test_a_listener_that_fails_ends_its_own_sequence_only(loop: EngineLoop, question: ModelInput) -> None:
    heard: list[Token] = []

    def fail(token: Token) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise KeyError("client is gone")

    failing = loop.submit(question, GREEDY, on_token=fail)
    beside = loop.submit(question, GREEDY)
    with pytest.raises(KeyError, match="client is gone"):
        failing.result(30)
    assert [token.token_id for token in heard] == beside.result(30).token_ids[:3]
    assert loop.is_alive


def test_a_cancelled_listener_hears_no_more(loop: EngineLoop, question: ModelInput) -> None:
    """The listener cancels from within: nothing can come in between."""
    heard: list[Token] = []
    submitted = threading.Event()

    def listen(token: Token) -> None:
        submitted.wait(30)
        heard.append(token)
        if len(heard) == 3:
            assert future.cancel()

    future = loop.submit(question, LONG, on_token=listen)
    submitted.set()
    with pytest.raises(CancelledError):
        future.result(30)
    assert loop.submit(question, GREEDY).result(30).token_ids[:3] == [token.token_id for token in heard]


def test_a_listener_may_submit(loop: EngineLoop, question: ModelInput) -> None:
    others: list[Future[Completion]] = []
    first = loop.submit(question, GREEDY, on_token=lambda _: others.append(loop.submit(question, GREEDY)))
    answer = first.result(30).token_ids
    assert [other.result(30).token_ids for other in others] == [answer] * 8
