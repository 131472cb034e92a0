"""Thousands of random sequences through one engine: every future resolved, every answer right, nothing left behind.

SOAK_SEQUENCES=20000 makes it a long one.
"""

import gc
import os
import random
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import SamplingParams
from smolvlm.engine import BATCH, ONLINE, Completion, EngineLoop, Token
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.sequence import Sequence
from smolvlm.processor import ModelInput

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
NUM_ROUNDS, NUM_CLIENTS = 4, 4
NUM_EACH = int(os.environ.get("SOAK_SEQUENCES", "2400")) // (NUM_ROUNDS * NUM_CLIENTS)
STATM = Path("/proc/self/statm")
MAX_GROWTH_BYTES = 96 * 2**20  # of the second half; caches such as oneDNN's, of kernels by shape, fill up first


class ClientGone(Exception):
    """A listener's own error."""


@dataclass
class Request:
    """What a client asked for and heard; `leaves` says after how many tokens and how it leaves, None: never."""

    prompt: int
    length: int
    leaves: tuple[int, str] | None
    heard: list[int] = field(default_factory=list)
    submitted: Future[Future[Completion]] = field(default_factory=Future)

    @property
    def future(self) -> Future[Completion]:
        return self.submitted.result(60)

    def listen(self, token: Token) -> None:
        assert not self.future.done()
        self.heard.append(token.token_id)
        if self.leaves is not None and len(self.heard) == self.leaves[0]:
            if self.leaves[1] == "raises":
                raise ClientGone
            self.future.cancel()


@pytest.fixture(scope="module")
def prompts(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    image, other, text = (
        make_tiles(2, 3, seed=1),
        make_tiles(1, 2, seed=2),
        "Once upon a time there was a small model. ",
    )
    return [
        make_input(image, text="Caption?"),
        make_input(image, other, text="Compare."),
        make_input(make_tiles(2, 3, seed=1), text="Read all of it, please."),
        make_input(make_tiles(seed=3)),
        make_input(text="Hi"),
        *(make_input(text=text * number) for number in range(1, 6)),
    ]


def _client(loop: EngineLoop, prompts: list[ModelInput], seed: int) -> list[Request]:
    """Submit at random, in bursts; abort some from outside at whatever moment comes."""
    rng, requests = random.Random(seed), list[Request]()
    for _ in range(NUM_EACH):
        prompt, length = rng.randrange(len(prompts)), rng.randint(1, 12)
        leaves = (rng.randint(1, 12), rng.choice(["raises", "cancels"])) if rng.random() < 0.2 else None
        requests.append(request := Request(prompt, length, leaves))
        params = replace(GREEDY, max_new_tokens=length, top_logprobs=rng.choice([0, 0, 0, 2]))
        listen = None if leaves is None and rng.random() < 0.3 else request.listen
        request.submitted.set_result(loop.submit(prompts[prompt], params, rng.choice([BATCH, ONLINE]), listen))
        if rng.random() < 0.1:
            rng.choice(requests).future.cancel()
        if rng.random() < 0.05:
            wait([rng.choice(requests).future], timeout=60)
    return requests


def _outcome(request: Request) -> str:
    try:
        return request.future.result(120).finish_reason
    except CancelledError:
        return "cancelled"
    except ClientGone:
        return "raised"


def _assert_empty(blocks: BlockManager) -> None:
    assert blocks.num_free == blocks.num_blocks
    assert sorted(blocks._free) == list(range(blocks.num_blocks))
    assert not any(blocks._references)
    assert {block: key for key, block in blocks._blocks.items()} == blocks._keys


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0


def _live_sequences() -> int:
    gc.collect()
    return sum(type(each) is Sequence for each in gc.get_objects())


def _round(loop: EngineLoop, prompts: list[ModelInput], expected: list[list[int]], seed: int) -> Counter[str]:
    """How the requests of one round ended; the answers are compared, then forgotten."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        seeds = range(seed * NUM_CLIENTS, (seed + 1) * NUM_CLIENTS)
        requests = [each for client in pool.map(lambda one: _client(loop, prompts, one), seeds) for each in client]
    outcomes = Counter(_outcome(request) for request in requests)
    for request in requests:
        tokens = expected[request.prompt][: request.length]
        assert request.heard == tokens[: len(request.heard)]
        if _outcome(request) == "length":
            assert request.future.result().token_ids == tokens
    return outcomes


def test_thousands_of_sequences_leave_nothing_behind(make_engine: MakeEngine, prompts: list[ModelInput]) -> None:
    """Pages are scarce, so that known ones are handed out again all the time."""
    expected = [done.token_ids for done in make_engine(prefix_caching=False).generate(prompts, GREEDY)]
    engine = make_engine(max_num_sequences=6, max_num_tokens=96, kv_cache_bytes=2**19)
    before, outcomes, resident = _live_sequences(), Counter[str](), list[int]()
    with EngineLoop(engine) as loop:
        for number in range(NUM_ROUNDS):
            outcomes += _round(loop, prompts, expected, number)
            resident.append(_resident_bytes())
    assert outcomes.total() == NUM_ROUNDS * NUM_CLIENTS * NUM_EACH
    assert set(outcomes) == {"length", "cancelled", "raised"}
    assert _live_sequences() <= before
    assert resident[-1] - resident[1] < MAX_GROWTH_BYTES
    _assert_empty(engine.scheduler.blocks)
    assert (len(engine.scheduler.images), engine.has_unfinished, len(loop._pending)) == (0, False, 0)
    stats = loop.stats()
    assert (stats.num_waiting, stats.used_blocks) == (0, 0)
    assert 0 < stats.cached_tokens < stats.prompt_tokens
