"""The decoder process: what kills it costs one image, and its neighbours come out as if nothing had been."""

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from decoder_pictures import CONFIG, POLICY, picture
from PIL import Image
from waiting import wait_for

from pipeline.decode_process import DecoderOptions
from pipeline.decoder import MAX_CRASHES, Decoder
from pipeline.decoder_child import Prepared
from smolvlm.image import ImageLimits, ImagePolicy, decode_image, split_image


def options(timeout_s: float = 20.0, memory_bytes: int = 4 << 30, max_pixels: int = 1_000_000) -> DecoderOptions:
    return DecoderOptions(CONFIG, POLICY, ImageLimits(max_pixels=max_pixels), timeout_s, memory_bytes)


def starts(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the lives of the decoder from now on."""
    lives: list[int] = []
    original = decoder._start

    def counted() -> io.BufferedRWPair:
        lives.append(1)
        return original()

    monkeypatch.setattr(decoder, "_start", counted)
    return lives


def assert_like_in_process(images: list[bytes], prepared: list[Prepared], tiles: bytes, bad: set[int]) -> None:
    start = 0
    for index, (image, found) in enumerate(zip(images, prepared, strict=True)):
        own = tiles[start : start + found.num_bytes]
        start += found.num_bytes
        if index in bad:
            assert found.error is not None
            assert found.num_bytes == 0
            continue
        decoded = decode_image(image)
        expected = split_image(decoded.image, CONFIG, POLICY)
        assert own == expected.pixels.tobytes(), f"image {index}"
        assert found == Prepared(
            sha256=hashlib.sha256(image).hexdigest(),
            width=decoded.width,
            height=decoded.height,
            format=decoded.format,
            num_tiles=len(expected.pixels),
            rows=expected.rows,
            cols=expected.cols,
            num_bytes=expected.pixels.nbytes,
        )
    assert start == len(tiles)


Closing = Callable[[Decoder], Decoder]


@pytest.fixture
def closing() -> Iterator[Closing]:
    """Give a function that closes the decoders it is given when the test ends."""
    with ExitStack() as stack:

        def keep(decoder: Decoder) -> Decoder:
            stack.callback(decoder.close)
            return decoder

        yield keep


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(options())
    yield decoder
    decoder.close()


def test_batches_are_as_made_in_process_and_the_process_stays(decoder: Decoder) -> None:
    assert decoder.prepare([]) == ([], b"")
    small, large = [picture(i) for i in range(3)], [picture(100 + i) for i in range(40)]
    assert_like_in_process(small, *decoder.prepare(small), bad=set())
    pid = decoder.pid
    for batch in (large, small, large[::-1]):
        assert_like_in_process(batch, *decoder.prepare(batch), bad=set())
    assert decoder.pid == pid


def test_bad_images_are_typed_errors_of_a_decoder_that_lives_on(decoder: Decoder) -> None:
    bomb = io.BytesIO()
    Image.new("1", (4000, 4000)).save(bomb, "PNG")
    images = [picture(1), b"", b"hello world", picture(2)[:100], picture(3), bomb.getvalue(), b"%PDF-1.7 ..."]
    pid = decoder.pid
    prepared, tiles = decoder.prepare(images)
    assert [p.error and (p.error.code, p.error.stage) for p in prepared] == [
        None,
        ("empty", "prepare"),
        ("not_an_image", "prepare"),
        ("truncated", "prepare"),
        None,
        ("too_many_pixels", "prepare"),
        ("unsupported_format", "prepare"),
    ]
    assert_like_in_process(images, prepared, tiles, bad={1, 2, 3, 5, 6})
    assert prepared[3].sha256 == hashlib.sha256(images[3]).hexdigest()
    assert pid in (decoder.pid, None)


@pytest.mark.parametrize(("kind", "position"), [("segfault", 0), ("hang", 4), ("exit", 8)])
def test_poison_costs_three_lives_and_one_row(
    kind: str, position: int, closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = closing(Decoder(options(timeout_s=1.0)))
    lives = starts(decoder, monkeypatch)
    images = [picture(i, kind if i == position else None) for i in range(9)]
    prepared, tiles = decoder.prepare(images)
    assert_like_in_process(images, prepared, tiles, bad={position})
    error = prepared[position].error
    assert error is not None
    assert (error.code, error.stage, error.attempts) == ("quarantined", "prepare", MAX_CRASHES)
    cause = {"segfault": "SIGSEGV", "hang": "image.timeout_s = 1", "exit": "exit code 0"}[kind]
    assert cause in error.message
    assert len(lives) == MAX_CRASHES + (position < 8)


def test_several_poisons_side_by_side(closing: Closing) -> None:
    decoder = closing(Decoder(options(timeout_s=1.0)))
    kinds = [None, "segfault", "exit", None, "abort", None]
    images = [picture(i, kind) for i, kind in enumerate(kinds)]
    prepared, tiles = decoder.prepare(images)
    assert_like_in_process(images, prepared, tiles, bad={1, 2, 4})
    assert [p.error and p.error.code for p in prepared] == [kind and "quarantined" for kind in kinds]


def test_an_image_that_eats_memory_is_stopped_at_the_limit(closing: Closing) -> None:
    decoder = closing(Decoder(options(memory_bytes=1 << 30)))
    images = [picture(1), picture(2, "memory"), picture(3)]
    prepared, tiles = decoder.prepare(images)
    assert_like_in_process(images, prepared, tiles, bad={1})
    error = prepared[1].error
    assert error is not None
    assert (error.code, error.stage) == ("out_of_memory", "prepare")


def test_tiles_larger_than_the_shared_memory_mount_of_a_container(closing: Closing) -> None:
    decoder = closing(Decoder(DecoderOptions(CONFIG, ImagePolicy(longest_edge=2048), ImageLimits(), 20.0, 4 << 30)))
    prepared, tiles = decoder.prepare([picture(i) for i in range(8)])
    assert all(p.error is None for p in prepared)
    assert len(tiles) == sum(p.num_bytes for p in prepared) > 64 << 20


def test_a_decoder_killed_between_batches_is_started_again(closing: Closing) -> None:
    decoder = closing(Decoder(options()))
    images = [picture(i) for i in range(12)]
    decoder.prepare(images)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    assert_like_in_process(images, *decoder.prepare(images), bad=set())
    decoder.close()
    assert decoder.pid is None


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_decoder_dies_with_its_parent() -> None:
    script = """
import sys, time
from pipeline.decode_process import DecoderOptions
from pipeline.decoder import Decoder
decoder = Decoder(DecoderOptions.from_json(sys.argv[1]))
decoder.prepare([b"x"])
print(decoder.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script, options().to_json()], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not is_alive(child), 5)


def test_options_survive_the_command_line() -> None:
    assert DecoderOptions.from_json(options().to_json()) == options()


def test_tiles_cannot_be_taken_back(decoder: Decoder) -> None:
    """A child that a picture has taken over may write nonsense, but not shorten the file under its reader."""
    decoder.prepare([picture(1)])
    descriptor = decoder._memory.fileno()
    assert os.fstat(descriptor).st_size > 0
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
