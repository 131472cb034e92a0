"""The scheduler beside an encoder with a stream of its own, whose progress the test decides."""

import numpy as np
import pytest
import torch
from fixture_types import MakeEngine, MakeInput, MakeTiles
from two_streams import HandStream

from smolvlm import SamplingParams
from smolvlm.engine import ONLINE
from smolvlm.engine.admission import Limits
from smolvlm.engine.block_manager import BlockManager
from smolvlm.engine.scheduler import QUEUED, Decode, Encode, Prefill, Scheduler
from smolvlm.engine.sequence import Sequence, Status
from smolvlm.engine.vision_stream import VisionStream
from smolvlm.image import Tiles


class Device:
    """A scheduler, the encoder's stream, and all sequences."""

    def __init__(self, limits: Limits, blocks: int = 100) -> None:
        self.stream = HandStream()
        self.vision = VisionStream(self.stream)
        self.scheduler = Scheduler(limits, BlockManager(blocks, block_size=10), self.vision)
        self.sequences: list[Sequence] = []

    def add(self, tiles: int | Tiles = 0, prompt: int = 10, answer: int = 10, priority: int = 0) -> Sequence:
        images = [tiles if isinstance(tiles, Tiles) else _tiles(tiles)] if tiles else []
        params = SamplingParams(max_new_tokens=answer)
        sequence = Sequence([1] * prompt, images, params, priority, max_new_tokens=answer)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def run(self, count: int = 1, encodes_at_once: bool = False) -> str:
        """Do the next pieces of work: e(ncode), a(head: of sequences that wait), p(refill), d(ecode); online: E, P."""
        done = ""
        for _ in range(count):
            done += self._do(self.scheduler.schedule())
            if encodes_at_once:
                self.end_batches()
        return done

    def end_batches(self, number: int | None = None) -> None:
        self.stream.num_done = self.stream.num_marks if number is None else number

    def tiles_encoded(self) -> list[int]:
        return [sum(image.num_encoded for image in sequence.images) for sequence in self.sequences]

    def _do(self, work: object) -> str:
        match work:
            case Encode(spans):
                with self.vision.batch() as number:
                    for span in spans:
                        span.image.store(span.start, torch.zeros(span.stop - span.start, 1, 1), number)
                return self._kind(work)
            case Prefill(sequences):
                self.scheduler.start(sequences)
                return "P" if all(sequence.is_online for sequence in sequences) else "p"
        assert isinstance(work, Decode)
        return "d"

    def _kind(self, work: Encode) -> str:
        owners = [each for each in self.sequences if any(span.image in each.images for span in work.spans)]
        if all(owner.status is Status.WAITING for owner in owners):
            return "a"
        return "E" if all(owner.is_online for owner in owners) else "e"


def _tiles(count: int) -> Tiles:
    return Tiles(np.zeros((count, 2, 2, 3), dtype=np.uint8), 0, 0)


def test_decoding_goes_on_until_tiles_are_encoded() -> None:
    device = Device(Limits(4, 100, 4))
    device.add()
    assert device.run(2) == "pd"
    device.add(tiles=3)
    assert device.run(4) == "eddd"
    device.end_batches()
    assert device.run(2) == "pd"


def test_where_nobody_decodes_the_prefill_waits_for_the_first_batch_alone() -> None:
    device = Device(Limits(4, 100, tile_batch=2))
    first, second = device.add(tiles=2), device.add(tiles=2)
    assert device.run(3) == "eep"
    assert (first.status, second.status) == (Status.RUNNING, Status.ADMITTED)
    assert device.run(2) == "dd"
    device.end_batches()
    assert device.run() == "p"


def test_the_encoder_is_given_no_more_than_it_needs_to_go_on() -> None:
    device = Device(Limits(9, 100, tile_batch=1))
    device.add()
    device.run(2)
    device.add(tiles=9)
    assert device.run(5) == "eeddd"
    for ended in range(1, 4):
        device.end_batches(ended)
        assert device.run(3) == "edd"
        assert device.vision.num_under_way == QUEUED


def test_prompts_wait_for_others_to_be_packed_with_only_while_somebody_decodes() -> None:
    device = Device(Limits(9, 100, tile_batch=1))
    device.add()
    device.run(2)
    early, late = device.add(tiles=1), device.add(tiles=1)
    assert device.run(3) == "eed"
    device.end_batches(1)
    assert device.run() == "d"
    device.scheduler.abort(device.sequences[0])
    assert device.run() == "p"
    assert (early.status, late.status) == (Status.RUNNING, Status.ADMITTED)


def test_an_online_prompt_waits_for_its_tiles_on_the_device_before_batch_work_decodes() -> None:
    device = Device(Limits(9, 100, tile_batch=4))
    device.add()
    device.run(2)
    device.add(tiles=2, priority=ONLINE)
    assert device.run(3) == "EPd"
    assert device.stream.num_done == 0


def test_while_an_online_sequence_is_answered_the_next_one_waits_for_its_tiles() -> None:
    device = Device(Limits(9, 100, tile_batch=4))
    device.add(priority=ONLINE)
    device.run(2)
    device.add(tiles=2, priority=ONLINE)
    assert device.run(4) == "Eddd"
    device.end_batches()
    assert device.run(2) == "Pd"


@pytest.mark.parametrize("at_once", [False, True])
def test_one_batch_piece_at_a_time_and_a_decode_after_it_while_an_online_sequence_is_answered(at_once: bool) -> None:
    device = Device(Limits(9, 100, tile_batch=4, piece_tiles=1))
    device.add(priority=ONLINE)
    device.run()
    device.add(tiles=9)
    runs = device.run(9, encodes_at_once=at_once)
    assert runs == ("dedededed" if at_once else "deddddddd")


def test_batch_pieces_have_their_turn_under_a_steady_online_load() -> None:
    """As without a stream: one in PATIENCE + 1 pieces, and a decode after every second online one."""
    device = Device(Limits(9, 100, tile_batch=1))
    device.add(priority=ONLINE)
    device.run()
    device.add(tiles=9)
    device.add(tiles=99, priority=ONLINE)
    assert device.run(26, encodes_at_once=True) == "EdEEdEEdEEdEed" + "EEdEEdEEdEEd"


def test_tiles_of_waiting_sequences_are_encoded_while_others_decode() -> None:
    device = Device(Limits(1, 100, tile_batch=4, ahead_tiles=9))
    running = device.add()
    device.run()
    waiting = [device.add(tiles=tiles) for tiles in (3, 0, 3, 2, 4)]
    assert device.run(4) == "aadd"
    assert device.tiles_encoded() == [0, 3, 0, 3, 2, 0]
    device.end_batches()
    assert device.run(2) == "dd"
    device.scheduler.finish([running])
    assert device.run(2) == "ap"
    assert device.tiles_encoded() == [0, 0, 0, 3, 2, 4]
    assert waiting[0].status is Status.RUNNING
    assert device.stream.awaited == []


def test_what_batch_work_leaves_of_an_encoder_batch_is_for_those_that_wait() -> None:
    device = Device(Limits(1, 100, tile_batch=4, ahead_tiles=8))
    device.add(tiles=3)
    device.add(tiles=5)
    assert device.run() == "e"
    assert device.tiles_encoded() == [3, 1]


def test_online_sequences_that_wait_go_first_and_nobody_is_encoded_twice() -> None:
    device = Device(Limits(1, 100, tile_batch=1, online_sequences=0, ahead_tiles=9))
    running = device.add()
    device.run()
    shared = _tiles(2)
    for priority in (0, 0, ONLINE):
        device.add(shared if priority == 0 else 2, priority=priority)
    assert device.run(9, encodes_at_once=True).count("a") == 4
    assert device.tiles_encoded() == [0, 2, 2, 2]
    device.scheduler.finish([running])
    assert "E" not in device.run(5)


def test_aborted_sequences_make_room_for_others_ahead() -> None:
    device = Device(Limits(1, 100, tile_batch=2, ahead_tiles=2))
    device.add()
    device.run()
    first, second = device.add(tiles=2), device.add(tiles=2)
    assert device.run(3, encodes_at_once=True) == "add"
    device.scheduler.abort(first)
    assert device.run(2, encodes_at_once=True) == "ad"
    assert second.images[0].is_encoded
    device.scheduler.abort(second)
    device.scheduler.abort(device.sequences[0])
    assert not device.scheduler.has_unfinished
    assert (device.scheduler.blocks.num_free, len(device.scheduler.images)) == (100, 0)


def test_an_image_beyond_the_limit_waits_for_admission() -> None:
    device = Device(Limits(1, 100, tile_batch=1, ahead_tiles=4))
    running = device.add()
    device.run()
    device.add(tiles=5)
    assert device.run(3) == "ddd"
    device.scheduler.finish([running])
    assert device.run() == "e"


def test_tiles_that_others_have_computed_are_not_encoded_ahead(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    image = make_tiles(1, 2, seed=1)
    engine = make_engine(max_num_sequences=1)
    engine.runner.vision = VisionStream(HandStream(num_done=99))
    engine.scheduler = Scheduler(engine.scheduler.limits, engine.scheduler.blocks, engine.runner.vision)
    texts = [f"Once upon a time there was a small model that read pages. {end}" for end in ("Read.", "What is this?")]
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    first = engine.add(make_input(image, text=texts[0]), params)
    while first.status is not Status.RUNNING:
        engine.step()
    second, other = (engine.add(make_input(each, text=texts[1]), params) for each in (image, make_tiles(seed=2)))
    engine.step()
    assert [each.images[0].num_encoded for each in (second, other)] == [0, 1]
    while engine.has_unfinished:
        engine.step()
    assert second.num_cached > 0
