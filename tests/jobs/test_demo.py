"""The demo: its pictures, the folder it may replace, and the whole of it as a user runs it."""

import os
import subprocess
from pathlib import Path

import duckdb
import pytest
from console_script import SMOLVLM

from jobs import demo
from jobs.demo_images import BROKEN, SIDEWAYS, demo_images
from pipeline.errors import ConfigError
from smolvlm.image import ImageError, decode_image
from smolvlm.training.metrics import measure


def test_the_images_are_good_but_for_the_one_that_is_broken() -> None:
    images = {name: image.data for name, image in demo_images().items()}
    with pytest.raises(ImageError) as error:
        decode_image(images.pop(BROKEN))
    assert error.value.code == "truncated"
    sizes = {name: decode_image(data).image.size for name, data in images.items()}
    assert sizes[SIDEWAYS] == (300, 266)  # stored as 266×300
    assert all(max(size) <= 512 for size in sizes.values())
    assert {name: image.data for name, image in demo_images().items()} == {**images, BROKEN: demo_images()[BROKEN].data}


def test_only_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    demo._clear(tmp_path / "none")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="choose another folder"):
        demo._clear(tmp_path)
    (tmp_path / "_job.json").write_text('{"name": "other"}')
    with pytest.raises(ConfigError, match="choose another folder"):
        demo._clear(tmp_path)
    assert (tmp_path / "mine.txt").exists()
    (tmp_path / "_job.json").write_text('{"name": "demo"}')
    demo._clear(tmp_path)
    assert not tmp_path.exists()


def test_the_whole_demo(tmp_path: Path) -> None:
    output = tmp_path / "demo-output"
    command = [str(SMOLVLM), "demo", "-o", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert "every input has exactly one row" in done.stdout
    assert (output / "report.html").stat().st_size > 1000
    query = f"SELECT parse_filename(uri), status, error.code, ocr.text FROM '{output}/data/*.parquet'"
    rows = {name: (status, code, text) for name, status, code, text in duckdb.execute(query).fetchall()}
    assert rows.pop(BROKEN) == ("error", "truncated", None)
    assert rows.keys() == demo_images().keys() - {BROKEN}
    assert all(status == "ok" and text for status, _, text in rows.values())
    receipts = [(demo_images()[name].text, text) for name, (_, _, text) in rows.items() if name.startswith("receipt")]
    assert measure(receipts).cer.value < 0.03  # all but a space or a letter; the bundled model is a small one
