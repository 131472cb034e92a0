"""The survey against a count by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from mixed_source import picture

from jobs import plan_survey
from jobs.plan_survey import survey
from pipeline.job import Source


def test_counts_are_those_of_the_files(mixed: Path) -> None:
    found = survey(Source(str(mixed)), None, sample=200, seed=0)
    plain = [path for path in mixed.iterdir() if path.suffix in (".png", ".jpg")]
    assert found.images == len(plain) + 12 + 3 + 9
    assert found.listed_errors == {"duplicate_key": 1}
    assert found.sized == len(plain) + 12 + 2  # Parquet tells no sizes of cells
    members = sum(len(picture(30, 20 + i)) for i in range(12)) + len(picture(20, 20)) + len(picture(21, 20))
    assert found.known_bytes == sum(path.stat().st_size for path in plain) + members


def test_a_sample_as_large_as_the_source_is_the_source(mixed: Path) -> None:
    found = survey(Source(str(mixed)), None, sample=1000, seed=0)
    assert len(found.sample) == found.images - found.listed_errors.total()
    assert {item.weight for item in found.sample} == {1.0}
    names = Counter((item.ref.uri, item.ref.member) for item in found.sample)
    assert set(names.values()) == {1}


def test_a_small_sample_has_some_of_every_kind_and_stands_for_all(mixed: Path) -> None:
    found = survey(Source(str(mixed)), None, sample=16, seed=3)
    kinds = {(item.ref.kind, Path(item.ref.uri).suffix) for item in found.sample}
    assert kinds == {("object", ".png"), ("object", ".jpg"), ("tar", ".tar"), ("parquet", ".parquet")}
    assert sum(item.weight for item in found.sample) == pytest.approx(found.images - 1)
    assert len(found.sample) < 30


def test_the_same_seed_draws_the_same_and_another_draws_others(mixed: Path) -> None:
    first, again, other = (survey(Source(str(mixed)), None, 16, seed).sample for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_limit_is_that_of_a_run(mixed: Path) -> None:
    found = survey(Source(str(mixed)), 7, sample=200, seed=0)
    assert found.images == 7
    assert len(found.sample) == 7


def test_every_image_is_as_likely_as_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 rows in ten tables of one stratum: the mean place of the drawn ones is the middle."""
    columns = {"uri": [f"s3://b/{i:06}.jpg" for i in range(10_000)], "size": [1000] * 10_000}
    table = pa.table(
        {
            **columns,
            "member": pa.nulls(10_000, pa.string()),
            "kind": ["object"] * 10_000,
            "etag": ["e"] * 10_000,
            "offset": pa.nulls(10_000, pa.int64()),
            "error_code": pa.nulls(10_000, pa.string()),
            "error_message": pa.nulls(10_000, pa.string()),
        }
    )
    monkeypatch.setattr(plan_survey, "manifest_tables", lambda source, expand: iter([table] * 10))
    found = survey(Source("s3://b/"), None, sample=400, seed=0)
    places = np.array([item.ref.row for item in found.sample])
    assert (found.images, found.known_bytes, len(places)) == (100_000, 100_000_000, 400)
    assert abs(places.mean() - 50_000) < 3 * 100_000 / np.sqrt(12 * 400)
    assert {item.weight for item in found.sample} == {250.0}
