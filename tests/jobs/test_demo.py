import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from jobs import demo
from jobs.demo_images import demo_images
from pipeline.errors import ConfigError
from smolvlm.image import ImageError, decode_image


def test_the_images_are_good_but_for_the_one_that_is_broken() -> None:
    images = demo_images()
    assert len(images) == 13
    with pytest.raises(ImageError) as error:
        decode_image(images.pop("broken.jpg"))
    assert error.value.code == "truncated"
    sizes = {name: decode_image(data).image.size for name, data in images.items()}
    assert sizes["scene.jpg"] == (480, 320)  # stored on its side
    assert all(max(size) <= 512 for size in sizes.values())
    assert demo_images()["scene.jpg"] == images["scene.jpg"]


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


def test_the_whole_demo_with_a_small_checkpoint(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tiny_checkpoint, demo.checkpoint_directory())
    output = tmp_path / "demo-output"
    command = [str(Path(sys.executable).with_name("smolvlm")), "demo", "-o", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert "does NOT describe the\npictures" in done.stdout
    assert "every input has exactly one row" in done.stdout
    assert f"{output}/data" in done.stdout
    query = f"SELECT parse_filename(uri), status, error.code FROM '{output}/data/*.parquet'"
    rows = {name: (status, code) for name, status, code in duckdb.sql(query).fetchall()}
    assert rows == {name: ("error", "truncated") if name == "broken.jpg" else ("ok", None) for name in demo_images()}
