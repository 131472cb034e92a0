from pathlib import Path
from typing import Any

import pytest

from jobs import shortcuts, spec
from jobs.shortcuts import CAPTION, OCR, Options, one_task, with_options

CONTENT: dict[str, Any] = {
    "source": {"uri": "s3://b/in/"},
    "output": {"uri": "/data/out"},
    "model": {"id": "owner/model", "revision": "a" * 40, "dtype": "float32"},
}


@pytest.mark.parametrize("task", [CAPTION, OCR], ids=["caption", "ocr"])
def test_one_task_is_a_valid_job(task: dict[str, Any]) -> None:
    job = spec.parse(one_task(task, "s3://b/in/", "s3://b/out/")).to_job()
    assert [each.name for each in job.tasks] == [task["name"]]
    assert (job.source.uri, job.output.uri) == ("s3://b/in/", "s3://b/out/")
    assert len(job.model.revision or "") == 40


def test_a_gpu_is_used_where_a_driver_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, gpus in ((tmp_path, 1), (tmp_path / "none", 0)):
        monkeypatch.setattr(shortcuts, "_NVIDIA_DRIVER", path)
        assert one_task(CAPTION, "in", "out")["engine"] == {"gpus": gpus}


def test_no_options_change_nothing() -> None:
    assert with_options(CONTENT, Options()) == CONTENT


def test_options_replace_single_keys() -> None:
    changed = with_options(CONTENT, Options(limit=5, dtype="bfloat16", quantization="fp8", gpus=0.5, replicas=(1, 2)))
    model = {**CONTENT["model"], "dtype": "bfloat16", "quantization": "fp8"}
    engine = {"gpus": 0.5, "replicas": [1, 2]}
    assert changed == {**CONTENT, "model": model, "limit": 5, "engine": engine}


def test_another_model_does_not_keep_the_old_revision() -> None:
    assert with_options(CONTENT, Options(model="/x"))["model"] == {"id": "/x", "dtype": "float32"}
    assert with_options(CONTENT, Options(model="a/b", revision="b" * 40))["model"]["revision"] == "b" * 40


def test_an_endpoint_goes_to_s3_only() -> None:
    changed = with_options(CONTENT, Options(endpoint_url="http://host:1"))
    assert changed["source"] == {"uri": "s3://b/in/", "endpoint_url": "http://host:1"}
    assert changed["output"] == CONTENT["output"]


def test_a_broken_job_file_is_left_for_validation_to_name() -> None:
    broken: dict[str, Any] = {"source": "s3://x", "model": None, "engine": 3}
    assert with_options(broken, Options(dtype="float32", gpus=1.0, endpoint_url="http://host:1")) == broken
