"""The console script as a user runs it: real processes, a real Ray, the tiny checkpoint."""

import io
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from console_script import SMOLVLM, draw_images, smolvlm, write_job
from PIL import Image
from typer.testing import CliRunner, Result
from waiting import wait_for

from jobs import spec
from jobs.cli import app
from pipeline.storage import Location

COUNT = 300  # images of the interrupted run: many seconds of work on any machine, one sequence at a time


def verified(destination: Path | str, *options: str) -> Result:
    """Needs no process of its own."""
    return CliRunner().invoke(app, ["verify", str(destination), *options])


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON lines of a stream; Ray's C++ core may put a log line of its own on stderr."""
    return [json.loads(line) for line in text.splitlines() if not line.startswith("[")]


def test_run_verify_and_resume(tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str) -> None:
    images = draw_images(tmp_path / "images", 4)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    job = write_job(tmp_path, tiny_checkpoint, images)

    first = smolvlm("run", job, "--json", "--address", ray_cluster)
    assert first.returncode == 3, first.stderr  # one error row in five is more than one in twenty
    summary = json.loads(first.stdout)
    wanted = {"event": "summary", "inputs": 5, "rows": 5, "ok": 4, "error": 1, "resumed_rows": 0, "interrupted": False}
    assert wanted.items() <= summary.items()
    assert sum(summary["errors_by_code"].values()) == 1
    assert {item["event"] for item in objects(first.stderr)} == {"progress"}
    assert objects(first.stderr)[-1]["done"] == 5

    again = smolvlm("run", job, "--json", "--address", ray_cluster, "--max-error-share", "0.2")
    assert again.returncode == 0, again.stderr
    assert {"rows": 5, "error": 1, "resumed_rows": 5}.items() <= json.loads(again.stdout).items()

    checked = verified(tmp_path / "out", "--json")
    assert checked.exit_code == 0
    counts = {"inputs": 5, "rows": 5, "ok": 4, "error": 1, "missing": 0, "duplicate": 0, "unreadable": 0}
    assert json.loads(checked.stdout) == {**counts, "errors_by_code": summary["errors_by_code"], "problems": []}

    next((tmp_path / "out" / "data").glob("*.parquet")).unlink()
    damaged = smolvlm("verify", tmp_path / "out", "--json")
    assert damaged.returncode == 1
    assert json.loads(damaged.stdout)["missing"] > 0
    assert verified(tmp_path / "out").stdout.splitlines()[-1] == "NOT complete"


def test_a_limit_ends_a_run_with_4_and_a_higher_one_goes_on(
    tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str
) -> None:
    images = draw_images(tmp_path / "images", 6)
    for most, code, limit in ((4, 4, "max_images"), (9, 0, None)):
        job = write_job(tmp_path, tiny_checkpoint, images, limits={"max_images": most})
        done = smolvlm("run", job, "--json", "--address", ray_cluster)
        assert done.returncode == code, done.stderr
        assert {"rows": min(most, 6), "stopped_by": limit, "interrupted": False}.items() <= json.loads(
            done.stdout
        ).items()
    job = write_job(tmp_path, tiny_checkpoint, images, limits={"finish_by": "2020-01-01T00:00:00Z"})
    late = smolvlm("run", job, "--json", "--address", ray_cluster)
    assert (late.returncode, late.stdout) == (2, "")
    assert "limits.finish_by: 2020-01-01T00:00:00Z has passed" in late.stderr


def test_from_s3_to_s3_with_options_over_the_job_file(
    tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str, s3: str
) -> None:
    place = Location("s3://test/cli", s3)
    for number in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20 + number)).save(buffer, "JPEG")
        place.child(f"in/{number}.jpg").put(buffer.getvalue())
    output = {"uri": "s3://test/cli/out"}
    job = write_job(tmp_path, Path("/no/such/checkpoint"), "s3://test/cli/in/", output=output)
    options = ("--endpoint-url", s3, "--limit", "3", "--model", str(tiny_checkpoint), "--address", ray_cluster)
    done = smolvlm("run", job, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert {"inputs": 3, "ok": 3, "output_uri": "s3://test/cli/out"}.items() <= json.loads(done.stdout).items()
    assert verified("s3://test/cli/out", "--endpoint-url", s3).exit_code == 0


def test_caption_on_a_ray_of_its_own_then_another_task_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    images = draw_images(tmp_path / "images", 3)
    options = ("-o", tmp_path / "out", "--model", tiny_checkpoint, "--dtype", "float32", "--gpus", "0")
    done = smolvlm("caption", images, *options, RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stderr
    assert objects(done.stderr) == []
    lines = objects(done.stdout)
    assert [line["event"] for line in lines[:-1]] == ["progress"] * (len(lines) - 1)
    assert {"event": "summary", "inputs": 3, "ok": 3}.items() <= lines[-1].items()

    refused = smolvlm("ocr", images, *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "holds rows of a different job" in refused.stderr
    assert "tasks.ocr.prompt" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_first_interrupt_drains_and_a_second_run_finishes(
    tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str
) -> None:
    images = draw_images(tmp_path / "images", COUNT)
    tasks = [{"name": name, "prompt": "What is this?", "max_new_tokens": 32} for name in ("a", "b")]
    changes = {"tasks": tasks, "image": {"splitting": False}}
    job = write_job(tmp_path, tiny_checkpoint, images, **changes, engine={"max_num_sequences": 1})
    command = [str(SMOLVLM), "run", str(job), "--address", ray_cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while '"event": "progress"' not in process.stdout.readline():
            assert process.poll() is None
        wait_for(lambda: list((tmp_path / "out" / "data").glob("*.parquet")), 120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    summary = objects(out)[-1]
    assert summary["interrupted"]
    assert 0 < summary["rows"] < COUNT
    missing = json.loads(verified(tmp_path / "out", "--json").stdout)
    assert (missing["rows"], missing["missing"], missing["duplicate"]) == (summary["rows"], COUNT - summary["rows"], 0)

    job = write_job(tmp_path, tiny_checkpoint, images, **changes)
    done = smolvlm("run", job, "--json", "--address", ray_cluster)
    assert done.returncode == 0, done.stderr
    assert {"rows": COUNT, "resumed_rows": summary["rows"]}.items() <= json.loads(done.stdout).items()
    assert verified(tmp_path / "out").exit_code == 0


def test_mistakes_end_with_2_a_message_and_no_traceback(tmp_path: Path, tiny_checkpoint: Path) -> None:
    images = draw_images(tmp_path / "images", 1)
    wrong_job = write_job(tmp_path, tiny_checkpoint, images, limit=0)
    nested = write_job(tmp_path / "images", tiny_checkpoint, tmp_path)
    mistakes = {
        "`limit`: 0: must be greater than 0": ("run", wrong_job),
        "no such file": ("run", tmp_path / "none.yaml"),
        "lies inside source.uri": ("run", nested),
        "`model.revision`": ("caption", images, "-o", tmp_path / "out", "--model", "owner/model"),
        "`model.dtype`": ("caption", images, "-o", tmp_path / "out", "--dtype", "int4"),
        "no complete manifest": ("verify", tmp_path, "--json"),
        "holds something other than an earlier demo": ("demo", "-o", images),
        "No such option: --lmit": ("run", wrong_job, "--lmit", "3"),
        "No such command 'capton'": ("capton",),
    }
    for message, arguments in mistakes.items():
        done = smolvlm(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert message in " ".join(done.stderr.replace("│", " ").split())
        assert "Traceback" not in done.stderr


def test_mistakes_that_only_storage_can_tell(tmp_path: Path, tiny_checkpoint: Path, ray_cluster: str, s3: str) -> None:
    (tmp_path / "empty").mkdir()
    options = ("-o", tmp_path / "out", "--model", tiny_checkpoint, "--gpus", "0", "--address", ray_cluster)
    sources = {
        str(tmp_path / "empty"): "no image",
        str(tmp_path / "none"): "none",
        "s3://no-such-bucket/x/": "no-such-bucket",
    }
    for source, message in sources.items():
        done = smolvlm("caption", source, *options, "--endpoint-url", s3)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_schema_prints_the_committed_file() -> None:
    assert smolvlm("schema").stdout == spec.SCHEMA_PATH.read_text()
