"""`_job.json`: whose rows these are, and what a resume may and may not change."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.claim import check_claim, claim, file_metadata, fingerprint
from pipeline.errors import FingerprintMismatch
from pipeline.job import EngineOptions, ImageOptions, Job, Model, Output, Source, Task
from pipeline.storage import Location


@pytest.fixture
def job(tiny_checkpoint: Path) -> Job:
    tasks = (Task("caption", "Describe."), Task("ocr", "Read.", temperature=0.5))
    return Job("x", Source("s3://b/in/"), Output("s3://b/out/"), Model(str(tiny_checkpoint)), tasks)


@pytest.fixture
def destination(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "out"))


def test_a_claim_is_written_once_and_says_what_ran(destination: Location, job: Job) -> None:
    check_claim(destination, job)  # nobody's yet
    claim(destination, job)
    first = destination.child("_job.json").read()
    claim(destination, job)
    check_claim(destination, job)
    assert destination.child("_job.json").read() == first
    content = json.loads(first)
    assert (content["name"], content["job"]["tasks"][1]["prompt"]) == ("x", "Read.")
    assert content["version"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"tasks": (Task("caption", "Describe it."), Task("ocr", "Read.", temperature=0.5))},
            "tasks.caption.prompt: 'Describe.'",
        ),
        ({"tasks": (Task("caption", "Describe."),)}, "tasks.ocr.prompt: 'Read.' in the output, None now"),
        ({"seed": 1}, "seed: 0 in the output, 1 now"),
        ({"limit": 5}, "limit: None in the output, 5 now"),
        ({"source": Source("s3://b/other/")}, "source.uri: 's3://b/in/' in the output, 's3://b/other/' now"),
        ({"source": Source("s3://b/in/", glob="*.jpg")}, "source.glob"),
        ({"image": ImageOptions(longest_edge=512)}, "image.longest_edge: None in the output, 512 now"),
        ({"image": ImageOptions(fast=True)}, "image.fast: None in the output, True now"),
        ({"model": Model("bundled", kv_cache_dtype="fp8")}, "model.kv_cache_dtype: None in the output, 'fp8' now"),
    ],
)
def test_a_different_job_is_refused_naming_the_difference(
    destination: Location, job: Job, changes: dict[str, Any], named: str
) -> None:
    claim(destination, job)
    for check in (check_claim, claim):
        with pytest.raises(FingerprintMismatch) as caught:
            check(destination, replace(job, **changes))
        assert named in str(caught.value)
        assert "Restore the job or choose another output" in str(caught.value)
        assert len(str(caught.value).splitlines()) - 2 <= 6  # only what differs


def test_an_output_from_before_there_were_these_options_goes_on(job: Job) -> None:
    assert not {"image.fast", "model.kv_cache_dtype"} & set(fingerprint(job))


def test_how_a_job_runs_may_change(destination: Location, job: Job) -> None:
    claim(destination, job)
    changed = replace(
        job,
        name="renamed",
        engine=EngineOptions(replicas=(2, 8), threads=1),
        output=replace(job.output, rows_per_file=7),
        source=replace(job.source, endpoint_url="http://other:9000"),
        image=replace(job.image, timeout_s=99.0),
    )
    check_claim(destination, changed)
    assert fingerprint(changed) == fingerprint(job)


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path, job: Job) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(job.model.id, moved)
    same = replace(job, model=Model(str(moved)))
    assert fingerprint(same) == fingerprint(job)
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert fingerprint(same) != fingerprint(job)


def test_a_hub_model_is_known_by_id_and_revision(job: Job) -> None:
    pinned = replace(job, model=Model("owner/name", revision="a" * 40))
    assert fingerprint(pinned)["model.revision"] == "a" * 40
    assert fingerprint(pinned) != fingerprint(replace(pinned, model=Model("owner/name", revision="b" * 40)))


def test_file_metadata_names_the_job_and_its_model(job: Job) -> None:
    found = file_metadata(job)
    assert set(found) == {f"smolvlm.{key}" for key in ("job", "fingerprint", "model", "revision", "version")}
    assert all(isinstance(value, str) for value in found.values())
    assert found["smolvlm.fingerprint"] == file_metadata(replace(job, name="y"))["smolvlm.fingerprint"]
    assert found["smolvlm.fingerprint"] != file_metadata(replace(job, seed=3))["smolvlm.fingerprint"]
