"""Imports run one way: jobs, cluster → pipeline → smolvlm."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("smolvlm", "pipeline", "jobs", "cluster")
MAY_IMPORT = {
    "smolvlm": {"smolvlm"},
    "pipeline": {"pipeline", "smolvlm"},
    "jobs": {"jobs", "pipeline", "smolvlm"},
    "cluster": {"cluster", "pipeline", "smolvlm"},
}
# smolvlm runs in a notebook or on a bare GPU machine.
FORBIDDEN_IN_SMOLVLM = {"ray", "pyarrow", "fsspec", "s3fs", "fastapi", "pydantic", "typer", "rich"}
# Manifest, records, storage and decoding are tested without a cluster.
WITHOUT_RAY = (
    "records",
    "storage",
    "manifest",
    "ranges",
    "tar",
    "source",
    "labelled",
    "commit",
    "lease",
    "limits",
    "replace",
    "finish",
    "claim",
    "decode_process",
    "decoder",
)
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every absolute module name that the file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            names.add(node.module or "")
    return names


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)}


def test_the_rule_has_files_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = roots(path) & {*PACKAGES, "tests", "benchmarks", "examples"}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "smolvlm")], ids=lambda path: path.name
)
def test_smolvlm_needs_no_pipeline_dependency(path: Path) -> None:
    assert not roots(path) & FORBIDDEN_IN_SMOLVLM


@pytest.mark.parametrize("name", WITHOUT_RAY)
def test_pipeline_parts_stay_free_of_ray(name: str) -> None:
    assert "ray" not in roots(ROOT / "pipeline" / f"{name}.py")


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline" / "endpoint").glob("*.py")), ids=lambda path: path.name)
def test_the_endpoint_stays_free_of_ray_and_torch(path: Path) -> None:
    assert not roots(path) & {"ray", "torch"}


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("def late():\n    from ray.data import Dataset\n    import jobs.cli\n")
    assert roots(file) == {"ray", "jobs"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("smolvlm", {"torch", "transformers", "ray", "pyarrow"}),
        ("smolvlm.image", {"torch", "transformers", "ray", "pyarrow"}),
        ("pipeline.storage", {"torch", "transformers", "ray"}),
        ("jobs.cli", {"torch", "transformers", "ray"}),
        ("jobs.spec", {"torch", "transformers", "ray"}),
        ("jobs.status", {"torch", "transformers", "ray"}),
        ("jobs.report", {"torch", "transformers", "ray"}),
        ("pipeline.endpoint.app", {"torch", "transformers", "ray"}),
    ],
)
def test_light_imports_stay_light(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & {unwanted!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
