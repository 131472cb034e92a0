"""Who gets memory next; sequences without a model."""

import pytest

from smolvlm.engine import BATCH, ONLINE
from smolvlm.engine.admission import PATIENCE, Admission, Limits
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.sequence import Sequence, Status
from smolvlm.sampling import SamplingParams


def _admission(sequences: int = 4, extra: int = 0, blocks: int = 100, kept: int = 0) -> Admission:
    limits = Limits(sequences, 100, 1, online_sequences=extra, online_blocks=kept)
    return Admission(limits, BlockManager(blocks, block_size=10))


def _add(admission: Admission, priority: int, blocks: int = 1, count: int = 1) -> list[Sequence]:
    """Sequences that need so many blocks each."""
    params = SamplingParams(max_new_tokens=1)
    made = [Sequence([1] * (10 * blocks - 1), [], params, priority, max_new_tokens=1) for _ in range(count)]
    for sequence in made:
        admission.add(sequence)
    return made


def _admit(admission: Admission, active: list[Sequence]) -> list[Sequence]:
    """All that are admitted now; they join the active."""
    admitted: list[Sequence] = []
    while sequence := admission.admit(active):
        admitted.append(sequence)
        active.append(sequence)
    return admitted


def _leave(admission: Admission, active: list[Sequence], sequence: Sequence) -> None:
    active.remove(sequence)
    admission.blocks.release(sequence.block_table)
    sequence.status = Status.FINISHED


def test_online_goes_first_then_whoever_came_first() -> None:
    admission = _admission()
    batch, online = _add(admission, BATCH, count=2), _add(admission, ONLINE, count=2)
    assert _admit(admission, []) == online + batch
    assert not admission.has_waiting


def test_a_full_engine_still_has_slots_for_online() -> None:
    admission, active = _admission(sequences=2, extra=2), list[Sequence]()
    batch = _add(admission, BATCH, count=3)
    assert _admit(admission, active) == batch[:2]
    online = _add(admission, ONLINE, count=3)
    assert _admit(admission, active) == online[:2]
    _leave(admission, active, batch[0])
    assert _admit(admission, active) == online[2:]
    _leave(admission, active, online[0])
    assert _admit(admission, active) == batch[2:]


def test_batch_work_alone_has_all_pages() -> None:
    admission = _admission(blocks=10, kept=4)
    batch = _add(admission, BATCH, blocks=5, count=2)
    assert _admit(admission, []) == batch


def test_pages_are_kept_for_online_once_there_was_any() -> None:
    admission, active = _admission(blocks=10, kept=4), list[Sequence]()
    first = _add(admission, ONLINE, blocks=2)
    assert _admit(admission, active) == first
    batch = _add(admission, BATCH, blocks=3, count=3)
    assert _admit(admission, active) == batch[:2]
    _leave(admission, active, first[0])
    assert _admit(admission, active) == []
    online = _add(admission, ONLINE, blocks=4)
    assert _admit(admission, active) == online


def test_what_online_holds_counts_towards_what_is_kept_for_it() -> None:
    admission, active = _admission(blocks=10, kept=4), list[Sequence]()
    online, batch = _add(admission, ONLINE, blocks=5), _add(admission, BATCH, blocks=5)
    assert _admit(admission, active) == online + batch


def test_an_online_sequence_that_waits_for_pages_holds_back_batch_work() -> None:
    admission, active = _admission(blocks=10), list[Sequence]()
    large = _add(admission, BATCH, blocks=8)
    assert _admit(admission, active) == large
    online, batch = _add(admission, ONLINE, blocks=9), _add(admission, BATCH)
    assert _admit(admission, active) == []
    _leave(admission, active, large[0])
    assert _admit(admission, active) == online + batch


def test_a_steady_online_load_lets_a_batch_sequence_in_now_and_then() -> None:
    """Two slots, always an online sequence waiting for the next; batch work needs more than what is not kept."""
    admission, active = _admission(sequences=2, blocks=10, kept=8), list[Sequence]()
    _add(admission, ONLINE, blocks=4, count=2)
    _admit(admission, active)
    batch = _add(admission, BATCH, blocks=3, count=2)
    order: list[int] = []
    for _ in range(3 * PATIENCE):
        _add(admission, ONLINE, blocks=4)
        _leave(admission, active, active[0])
        order += [sequence.priority for sequence in _admit(admission, active)]
    assert [sequence.status for sequence in batch] == [Status.FINISHED] * 2
    assert order.index(BATCH) == PATIENCE
    assert order[PATIENCE + 1 :].index(BATCH) >= PATIENCE


def test_batch_work_in_the_engine_waits_its_turn_for_more() -> None:
    admission, active = _admission(sequences=2, extra=1), list[Sequence]()
    batch = _add(admission, BATCH, count=3)
    assert _admit(admission, active) == batch[:2]
    for _ in range(3 * PATIENCE):
        online = _add(admission, ONLINE)
        assert _admit(admission, active) == online
        _leave(admission, active, online[0])


def test_aborted_ones_are_passed_over() -> None:
    admission = _admission()
    batch = _add(admission, BATCH, count=3)
    for sequence in batch[:2]:
        sequence.status = Status.FINISHED
    assert list(admission.batch) == batch[2:]
    assert _admit(admission, []) == batch[2:]


@pytest.mark.parametrize("name", ["piece_tokens", "piece_tiles"])
def test_pieces_hold_something(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Limits(1, 1, 1, **{name: 0})


@pytest.mark.parametrize("name", ["online_sequences", "online_blocks"])
def test_nothing_may_be_kept_for_online(name: str) -> None:
    assert getattr(Limits(1, 1, 1, **{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least 0"):
        Limits(1, 1, 1, **{name: -1})
