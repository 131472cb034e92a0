from collections.abc import Generator, Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from word_pictures import WordPictures

from smolvlm.training.batches import WINDOW_STEPS, Batch, Share, Window, Windows, collate, steps
from smolvlm.training.examples import NO_TARGET, ExampleMaker, Labelled
from smolvlm.training.glyphs import SLOTS

ALONE = Share(rank=0, world=1, batch_size=4, micro_batches=1)


def windows(
    make: ExampleMaker, share: Share = ALONE, num_examples: int | None = None, empty_from: int | None = None
) -> Windows:
    return Windows(WordPictures(empty_from=empty_from), make, share, num_examples, seed=5)


def window_of(source: Windows, number: int) -> Window:
    """One without a bad example."""
    window = source[number]
    assert not isinstance(window, ValueError)
    return window


def equal(ours: Batch, theirs: Batch) -> bool:
    return all(torch.equal(value, getattr(theirs, name)) for name, value in vars(ours).items())


def all_equal(ours: Iterator[list[Batch]], theirs: Iterator[list[Batch]]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(len(a) == len(b) and all(map(equal, a, b)) for a, b in pairs) and len(pairs) > 0


def shades(micro_batches: list[Batch]) -> list[int]:
    """Which of fifty pictures a step holds: their paper says so."""
    return [255 - int(tile[0, 0, 2]) for batch in micro_batches for tile in batch.pixels]


def test_padding_comes_last_and_counts_for_nothing(make: ExampleMaker) -> None:
    short, long = make(WordPictures()(0)), make(WordPictures()(3))
    batch = collate([short, long], make.config.image_token_id)
    length, cut = len(long.token_ids), len(short.token_ids)
    assert batch.token_ids.shape == batch.labels.shape == batch.reading.shape == (2, length)
    assert cut < length
    assert batch.token_ids[0, :cut].tolist() == short.token_ids.tolist()
    assert (batch.labels[0, cut:] == NO_TARGET).all()
    assert (batch.reading[0, cut:] == NO_TARGET).all()
    assert batch.labels[1].tolist() == long.labels.tolist()
    assert batch.pixels.shape == (2, 64, 64, 3)
    assert batch.glyphs.shape == (2, 64, SLOTS)
    rows = [np.flatnonzero(each.token_ids == make.config.image_token_id) for each in (short, long)]
    assert batch.image_positions.tolist() == [*rows[0], *(rows[1] + length)]


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 3), (3, 1), (2, 4)])
def test_a_batch_that_cannot_be_cut_is_refused(world: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size 4 .*\({world}\).*\({micro_batches}\)"):
        Share(0, world, 4, micro_batches)


def test_a_window_follows_from_seed_and_number_alone(make: ExampleMaker) -> None:
    first, again = windows(make), windows(make)
    again[0]  # what was asked before does not matter
    assert all_equal(iter(window_of(first, 1)), iter(window_of(again, 1)))
    other = Windows(WordPictures(), make, ALONE, None, seed=6)
    assert not all_equal(iter(window_of(first, 1)), iter(window_of(other, 1)))


def test_a_window_holds_its_examples_once_by_length(make: ExampleMaker) -> None:
    window = window_of(windows(make), 0)
    assert len(window) == WINDOW_STEPS
    assert sorted(each for step in window for each in shades(step)) == list(range(WINDOW_STEPS * 4))
    lengths = sorted(int((batch.token_ids != 0).sum(1).max()) for (batch,) in window)
    shortest = sorted(int((batch.token_ids != 0).sum(1).min()) for (batch,) in window)
    assert all(most <= least for most, least in zip(lengths, shortest[1:], strict=False))  # neighbours in length


def test_micro_batches_cut_a_step(make: ExampleMaker) -> None:
    window = window_of(windows(make, Share(0, 1, 4, 2)), 0)
    assert [[len(batch.token_ids) for batch in step] for step in window] == [[2, 2]] * WINDOW_STEPS


def test_processes_share_a_window_between_them(make: ExampleMaker) -> None:
    parts = [window_of(windows(make, Share(rank, 2, 4, 1)), 0) for rank in (0, 1)]
    held = [sorted(each for step in part for each in shades(step)) for part in parts]
    assert held == [list(range(0, 32, 2)), list(range(1, 32, 2))]
    assert all(len(step[0].token_ids) == 2 for part in parts for step in part)


def test_a_source_is_gone_through_in_a_new_order_each_time(make: ExampleMaker) -> None:
    source = windows(make, num_examples=16)  # a window of 32 is two passes
    seen = [index for window in (0, 1) for index in source._indices(window)]
    passes = [seen[start : start + 16] for start in range(0, 64, 16)]
    assert [sorted(each) for each in passes] == [list(range(16))] * 4
    assert len({tuple(each) for each in passes}) == 4


@pytest.mark.parametrize(("first", "last"), [(0, 16), (5, 16), (8, 9), (11, 13)])
def test_steps_begin_and_end_anywhere(make: ExampleMaker, first: int, last: int) -> None:
    whole = [window_of(windows(make), number) for number in (0, 1)]
    expected = [step for window in whole for step in window][first:last]
    assert all_equal(steps(windows(make), first, last, workers=0), iter(expected))


def test_data_workers_change_nothing(make: ExampleMaker) -> None:
    assert all_equal(steps(windows(make), 3, 12, workers=1), steps(windows(make), 3, 12, workers=0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which memory is pinned for")
def test_batches_for_a_gpu_are_pinned(make: ExampleMaker) -> None:
    pinned = [batch for step in steps(windows(make), 3, 12, workers=1, pin=True) for batch in step]
    assert all(value.is_pinned() for batch in pinned for value in vars(batch).values() if value.numel())
    assert all_equal(iter([pinned]), iter([[b for step in steps(windows(make), 3, 12, workers=0) for b in step]]))


def test_data_workers_end_in_silence_wherever_they_are(make: ExampleMaker, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        drawn = steps(windows(make), 0, 1000, workers=2)
        assert isinstance(drawn, Generator)
        next(drawn)
        drawn.close()  # each of them is drawing or sending a window
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_example_is_named_when_its_window_is_reached(make: ExampleMaker, workers: int) -> None:
    source = windows(make, empty_from=40)
    given = steps(source, 0, 24, workers)
    assert len(list(islice(given, WINDOW_STEPS))) == WINDOW_STEPS
    with pytest.raises(ValueError, match=r"^picture 40: the text is empty; .*$") as error:
        next(given)
    assert "Traceback" not in str(error.value)


def test_what_is_no_fault_of_the_data_is_raised_as_it_is(make: ExampleMaker) -> None:
    def broken(index: int) -> Labelled:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(steps(Windows(broken, make, ALONE, None, 0), 0, 1, workers=0))
