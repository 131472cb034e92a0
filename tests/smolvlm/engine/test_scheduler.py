"""The scheduler alone, on sequences without a model: encoding is done by storing empty features."""

import numpy as np
import pytest
import torch

from smolvlm.engine import ONLINE
from smolvlm.engine.admission import PATIENCE, Limits
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.scheduler import Decode, Encode, Prefill, Scheduler
from smolvlm.engine.sequence import Sequence, Status
from smolvlm.image import Tiles
from smolvlm.sampling import SamplingParams


def _scheduler(sequences: int = 4, tokens: int = 100, tiles: int = 4, blocks: int = 100) -> Scheduler:
    return Scheduler(Limits(sequences, tokens, tiles), BlockManager(blocks, block_size=10))


def _tiles(count: int) -> Tiles:
    return Tiles(np.zeros((count, 2, 2, 3), dtype=np.uint8), 0, 0)


def _add(scheduler: Scheduler, *tiles: Tiles, prompt: int = 10, answer: int = 10, priority: int = 0) -> Sequence:
    params = SamplingParams(max_new_tokens=answer)
    sequence = Sequence([1] * prompt, list(tiles), params, priority, max_new_tokens=answer)
    scheduler.add(sequence)
    return sequence


def _encode(work: object) -> list[int]:
    """Pretend to encode; tiles per span."""
    assert isinstance(work, Encode)
    for span in work.spans:
        span.image.store(span.start, torch.zeros(span.stop - span.start, 1, 1))
    return [span.stop - span.start for span in work.spans]


def _prefill(scheduler: Scheduler) -> list[Sequence]:
    work = scheduler.schedule()
    assert isinstance(work, Prefill)
    scheduler.start(work.sequences)
    return work.sequences


def test_nothing_to_do() -> None:
    scheduler = _scheduler()
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def test_a_sequence_is_encoded_prefilled_and_decoded() -> None:
    scheduler = _scheduler()
    sequence = _add(scheduler, _tiles(2))
    assert _encode(scheduler.schedule()) == [2]
    assert _prefill(scheduler) == [sequence]
    assert scheduler.schedule() == Decode([sequence])
    scheduler.finish([sequence])
    assert sequence.status is Status.FINISHED
    assert not scheduler.has_unfinished
    assert scheduler.blocks.num_free == 100
    assert len(scheduler.images) == 0


def test_tiles_of_many_images_share_encoder_batches() -> None:
    scheduler = _scheduler(tiles=4)
    for count in (3, 2, 4):
        _add(scheduler, _tiles(count))
    batches = [_encode(scheduler.schedule()) for _ in range(3)]
    assert batches == [[3, 1], [1, 3], [1]]
    assert len(_prefill(scheduler)) == 3


def test_shared_tiles_are_encoded_once() -> None:
    scheduler, tiles = _scheduler(), _tiles(2)
    _add(scheduler, tiles)
    _add(scheduler, tiles, _tiles(1))
    assert _encode(scheduler.schedule()) == [2, 1]
    assert len(_prefill(scheduler)) == 2


def test_prompts_are_packed_up_to_the_budget() -> None:
    scheduler = _scheduler(sequences=9, tokens=100)
    sequences = [_add(scheduler, prompt=prompt) for prompt in (40, 50, 20, 300, 10)]
    assert [_prefill(scheduler) for _ in range(4)] == [sequences[:2], sequences[2:3], sequences[3:4], sequences[4:]]


def test_a_full_prefill_does_not_wait_for_more_images() -> None:
    scheduler = _scheduler(tokens=100, tiles=2)
    early = [_add(scheduler, prompt=45), _add(scheduler, prompt=45)]
    _add(scheduler, _tiles(2), prompt=45)
    assert _prefill(scheduler) == early


def test_pages_for_prompt_and_answer_are_reserved_and_block_those_behind() -> None:
    scheduler = _scheduler(blocks=10)
    first = _add(scheduler, prompt=30, answer=40)
    second = _add(scheduler, prompt=30, answer=20)
    third = _add(scheduler, prompt=5, answer=5)
    assert _prefill(scheduler) == [first]
    assert len(first.block_table) == 7
    assert scheduler.schedule() == Decode([first])
    scheduler.finish([first])
    assert _prefill(scheduler) == [second, third]


def test_no_more_sequences_than_the_limit() -> None:
    scheduler = _scheduler(sequences=2)
    sequences = [_add(scheduler) for _ in range(3)]
    assert _prefill(scheduler) == sequences[:2]
    scheduler.finish(sequences[:1])
    assert _prefill(scheduler) == sequences[2:]
    assert scheduler.schedule() == Decode(sequences[1:])


def test_higher_priority_is_admitted_and_encoded_first() -> None:
    scheduler = _scheduler(sequences=2, tiles=1)
    _add(scheduler, _tiles(1))
    second = _add(scheduler, _tiles(1))
    urgent = _add(scheduler, _tiles(1), priority=1)
    _encode(scheduler.schedule())
    assert urgent.is_encoded
    assert _prefill(scheduler) == [urgent]
    assert second.status is Status.WAITING


def test_lower_priority_work_delays_decoding_by_one_piece_at_a_time() -> None:
    scheduler = _scheduler(tiles=1)
    urgent = _add(scheduler, priority=1)
    assert _prefill(scheduler) == [urgent]
    _add(scheduler, _tiles(2))
    kinds = []
    for _ in range(4):
        work = scheduler.schedule()
        kinds.append(type(work))
        if isinstance(work, Encode):
            _encode(work)
    assert kinds == [Decode, Encode, Decode, Encode]


def test_equal_priority_fills_the_batch_before_it_decodes() -> None:
    scheduler = _scheduler(tiles=1)
    _add(scheduler)
    _prefill(scheduler)
    _add(scheduler, _tiles(2))
    assert [_encode(scheduler.schedule()) for _ in range(2)] == [[1], [1]]
    _prefill(scheduler)
    assert isinstance(scheduler.schedule(), Decode)


def _run(scheduler: Scheduler) -> str:
    """Pretend to do the next piece of work; what it was: e(ncode), p(refill) or d(ecode), upper case for online."""
    work = scheduler.schedule()
    match work:
        case Encode(spans):
            _encode(work)
            owners = [s for s in scheduler.admitted if any(span.image in s.images for span in spans)]
            return "E" if all(owner.is_online for owner in owners) else "e"
        case Prefill(sequences):
            scheduler.start(sequences)
            return "P" if all(sequence.is_online for sequence in sequences) else "p"
    assert isinstance(work, Decode)
    return "d"


def _runs(scheduler: Scheduler, count: int) -> str:
    return "".join(_run(scheduler) for _ in range(count))


def test_online_work_goes_first_also_before_the_decoding_of_batch_work() -> None:
    scheduler = _scheduler(sequences=9, tiles=1)
    _add(scheduler)
    assert _runs(scheduler, 2) == "pd"
    _add(scheduler, _tiles(3))
    _add(scheduler, _tiles(2), priority=ONLINE)
    assert _runs(scheduler, 9) == "EEPdedede"


def test_online_prompts_wait_for_no_other_image_and_for_no_batch_prompt() -> None:
    scheduler = _scheduler(sequences=9, tiles=1)
    _add(scheduler)
    early = _add(scheduler, _tiles(1), priority=ONLINE)
    _add(scheduler, _tiles(2), priority=ONLINE)
    assert _run(scheduler) == "E"
    assert _prefill(scheduler) == [early]
    assert _runs(scheduler, 6) == "dEEdPd"


def test_batch_work_comes_in_small_pieces_once_there_was_online_work() -> None:
    scheduler = Scheduler(Limits(9, 1000, 8, piece_tokens=30, piece_tiles=2), BlockManager(100, block_size=10))
    _add(scheduler, _tiles(5))
    assert _encode(scheduler.schedule()) == [5]
    online = _add(scheduler, priority=ONLINE)
    assert _prefill(scheduler) == [online]
    scheduler.finish([online])
    _prefill(scheduler)
    _add(scheduler, _tiles(5), prompt=70)
    assert [_encode(scheduler.schedule()) for _ in range(3)] == [[2], [2], [1]]
    assert [[s.num_scheduled for s in _prefill(scheduler)] for _ in range(3)] == [[30], [60], [70]]


def test_prompts_are_cut_to_fill_a_piece() -> None:
    scheduler = Scheduler(Limits(9, 1000, 8, piece_tokens=50), BlockManager(100, block_size=10))
    online = _add(scheduler, priority=ONLINE)
    _prefill(scheduler)
    batch = [_add(scheduler, prompt=prompt) for prompt in (20, 70, 5)]
    pieces = []
    while not all(sequence.status is Status.RUNNING for sequence in batch):
        work = scheduler.schedule()
        if isinstance(work, Prefill):
            pieces.append([(batch.index(s), s.num_computed, s.num_scheduled) for s in work.sequences])
            scheduler.start(work.sequences)
    assert pieces == [[(0, 0, 20), (1, 0, 30)], [(1, 30, 70), (2, 0, 5)]]
    assert online.status is Status.RUNNING


def test_an_online_prompt_is_cut_only_while_others_are_answered() -> None:
    scheduler = Scheduler(Limits(9, 1000, 8, piece_tokens=50), BlockManager(100, block_size=10))
    first = _add(scheduler, prompt=80, priority=ONLINE)
    assert _prefill(scheduler) == [first]
    _add(scheduler, prompt=130, priority=ONLINE)
    assert _runs(scheduler, 5) == "PdPPd"


def test_batch_work_has_a_turn_in_so_many_also_under_a_steady_online_load() -> None:
    """Batch sequences want to decode as well as to be encoded; the online ones never come to an end."""
    scheduler = _scheduler(sequences=9, tiles=1)
    _add(scheduler)
    assert _run(scheduler) == "p"
    _add(scheduler, _tiles(9))
    _add(scheduler, _tiles(99), priority=ONLINE)
    assert _runs(scheduler, 3 * (PATIENCE + 1)) == "E" * PATIENCE + "d" + "E" * PATIENCE + "e" + "E" * PATIENCE + "d"


def test_batch_pieces_have_their_turn_between_online_answers() -> None:
    scheduler = _scheduler(sequences=9, tiles=1)
    _add(scheduler, priority=ONLINE)
    assert _run(scheduler) == "P"
    _add(scheduler, _tiles(9))
    _add(scheduler, _tiles(99), priority=ONLINE)
    expected = ["E", *["dEE"] * (PATIENCE // 2 - 1), "dE", "ed", *["EEd"] * (PATIENCE // 2), "ed"]
    assert _runs(scheduler, len("".join(expected))) == "".join(expected)


def test_a_running_batch_goes_on_while_an_online_sequence_waits_for_its_memory() -> None:
    scheduler = _scheduler(blocks=10, tiles=1)
    _add(scheduler, prompt=10, answer=40)
    assert _run(scheduler) == "p"
    _add(scheduler, _tiles(3), prompt=10, answer=10)
    assert _run(scheduler) == "e"
    _add(scheduler, prompt=50, answer=40, priority=ONLINE)
    assert _runs(scheduler, 7) == "dededpd"


def test_abort_frees_everything_in_every_state() -> None:
    scheduler, shared = _scheduler(sequences=3, tiles=1), _tiles(2)
    running = _add(scheduler)
    _prefill(scheduler)
    half_encoded, sharing = _add(scheduler, shared), _add(scheduler, shared)
    waiting = _add(scheduler, _tiles(1))
    _encode(scheduler.schedule())
    for sequence in (half_encoded, waiting, running):
        scheduler.abort(sequence)
        assert (sequence.status, sequence.finish_reason) == (Status.FINISHED, "aborted")
    assert _encode(scheduler.schedule()) == [1]
    assert _prefill(scheduler) == [sharing]
    scheduler.finish([sharing])
    scheduler.abort(sharing)
    assert sharing.finish_reason is None
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished
    assert (scheduler.blocks.num_free, len(scheduler.images)) == (100, 0)


@pytest.mark.parametrize("name", ["max_num_sequences", "max_num_tokens", "tile_batch"])
def test_limits_below_one_are_named(name: str) -> None:
    values = {"max_num_sequences": 1, "max_num_tokens": 1, "tile_batch": 1}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Limits(**(values | {name: 0}))
