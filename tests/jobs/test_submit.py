"""Jobs on a real cluster of two nodes that asks for a token, through the command line; and what they leave nowhere."""

import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from console_script import draw_images, smolvlm, write_job
from typer.testing import CliRunner
from waiting import wait_for

from cluster.local import LocalCluster, local_cluster
from jobs import spec
from jobs.cli import app
from jobs.submit import Shipping, Submitted, check_names, entrypoint, exit_code, pack
from pipeline.errors import ConfigError

COUNT = 800  # images of the cancelled job: many seconds of work on any machine
ANSWERS = (  # whatever the dashboard tells about jobs, processes and nodes
    *("/api/jobs/", "/api/v0/jobs", "/api/v0/nodes?detail=1", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1"),
    *("/api/v0/workers?detail=1", "/api/v0/runtime_envs?detail=1", "/nodes?view=summary", "/api/cluster_status"),
)
IN_ENVIRONMENT = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GOOGLE_API_KEY", "AZURE_STORAGE_KEY"),
    *("DB_PASSWORD", "OPENAI_API_KEY"),
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def canaries() -> dict[str, str]:
    """Return secrets by the name of the variable that holds each."""
    return {name: f"canary-{secrets.token_hex(12)}" for name in IN_ENVIRONMENT}


@pytest.fixture(scope="module")
def cluster(canaries: dict[str, str]) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in canaries.items():
            patch.setenv(name, value)
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15, whatever else runs here goes before the job
        with local_cluster(nodes=2, cpus=2, object_store_bytes=1_200_000_000) as running:
            yield running


def last_object(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
    return found


def verified(destination: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads(CliRunner().invoke(app, ["verify", str(destination), "--json"]).stdout)
    return counts


def ask(cluster: LocalCluster, path: str, token: str | None) -> tuple[int, str]:
    request = urllib.request.Request(f"{cluster.dashboard}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_job_goes_to_the_cluster_and_leaves_rows_and_no_secret(
    cluster: LocalCluster, canaries: dict[str, str], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    job = write_job(tmp_path, tiny_checkpoint, draw_images(tmp_path / "images", 6))
    there = ("--address", cluster.dashboard)
    done = smolvlm("submit", job, *there, "--secret", "DB_PASSWORD", **cluster.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    submission_id = done.stderr.split()[1]
    for command in ("logs --follow", "status", "cancel"):
        assert f"smolvlm {command} {submission_id} --address {cluster.dashboard}" in done.stderr
    checks = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL"))]
    names = ("versions", "memory", "GPUs", "clock", "secrets", "source", "destination", "engine")
    assert sorted(checks) == sorted([["ok", "GPUs"], ["ok", "listing"], *([["ok", name] for name in names] * 2)])
    assert {"event": "summary", "rows": 6, "ok": 6}.items() <= last_object(done.stdout).items()
    assert {"rows": 6, "ok": 6, "missing": 0, "duplicate": 0}.items() <= verified(tmp_path / "out").items()

    listed = smolvlm("list", "--json", *there, **cluster.environment())
    (entry,) = [each for each in json.loads(listed.stdout)["jobs"] if each["id"] == submission_id]
    state = smolvlm("status", submission_id, "--json", *there, **cluster.environment())
    assert json.loads(state.stdout) == entry
    assert {"state": "SUCCEEDED", "job": "test", "output": str(tmp_path / "out")}.items() <= entry.items()
    logs = smolvlm("logs", submission_id, *there, **cluster.environment())
    assert last_object(logs.stdout) == last_object(done.stdout)

    token = cluster.token_path.read_text()
    hidden = {**canaries, "the token": token}
    shown = {
        **{f"{each.args}": each.stdout + each.stderr for each in (done, listed, state, logs)},
        **{path: ask(cluster, path, token)[1] for path in (*ANSWERS, f"/api/jobs/{submission_id}/logs")},
        **{str(path): path.read_bytes().decode("latin-1") for path in left_behind(cluster, tmp_path / "out")},
        **{f"footer of {path.name}": footer(path) for path in (tmp_path / "out" / "data").glob("*.parquet")},
    }
    assert submission_id in shown["/api/jobs/"]
    assert [(name, place) for name, secret in hidden.items() for place, text in shown.items() if secret in text] == []


def left_behind(cluster: LocalCluster, output: Path) -> list[Path]:
    """Every log and file of the cluster, but for the token's own, and every file of the output."""
    files = [path for folder in (cluster.folder, output) for path in folder.rglob("*")]
    return [path for path in files if path.is_file() and not path.is_symlink() and path != cluster.token_path]


def footer(path: Path) -> str:
    return str(pq.read_metadata(path).metadata)


def test_cancelling_drains_and_submitting_again_finishes(
    cluster: LocalCluster, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    tasks = [{"name": name, "prompt": "What is this?", "max_new_tokens": 32} for name in ("a", "b")]
    job = write_job(tmp_path, tiny_checkpoint, draw_images(tmp_path / "images", COUNT), tasks=tasks)
    submit = ("submit", job, "--no-preflight", "--json", "--address", cluster.dashboard)
    begun = smolvlm(*submit, "--no-wait", **cluster.environment())
    assert begun.returncode == 0, begun.stderr
    submission_id = json.loads(begun.stdout)["id"]
    wait_for(lambda: list((tmp_path / "out" / "data").glob("*.parquet")), 240)
    wait_for(lambda: "ray_smolvlm_job_rows_ok_total" in exported(cluster), 240)

    ended = smolvlm("cancel", submission_id, "--json", "--address", cluster.dashboard, **cluster.environment())
    assert json.loads(ended.stdout)["state"] == "STOPPED", ended.stderr
    logs = smolvlm("logs", submission_id, "--address", cluster.dashboard, **cluster.environment()).stdout
    summary = last_object(logs)
    assert summary["interrupted"]
    assert 0 < summary["rows"] < COUNT
    assert {"rows": summary["rows"], "missing": COUNT - summary["rows"], "duplicate": 0}.items() <= verified(
        tmp_path / "out"
    ).items()

    done = smolvlm(*submit, **cluster.environment())
    assert done.returncode == 0, done.stderr
    assert {"state": "SUCCEEDED", "exit_code": 0}.items() <= json.loads(done.stdout).items()
    assert {"rows": COUNT, "resumed_rows": summary["rows"]}.items() <= last_object(done.stderr).items()
    assert {"rows": COUNT, "missing": 0, "duplicate": 0}.items() <= verified(tmp_path / "out").items()


def exported(cluster: LocalCluster) -> str:
    """What Prometheus would read from all nodes, found as it finds them."""
    listed = json.loads((cluster.folder / "0" / "prom_metrics_service_discovery.json").read_text())
    texts = []
    for target in {target for group in listed for target in group["targets"]}:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as reply:
            texts.append(reply.read().decode())
    return "\n".join(texts)


def test_a_call_without_the_token_is_refused(cluster: LocalCluster, tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = write_job(tmp_path, tiny_checkpoint, draw_images(tmp_path / "images", 1))
    wrong = tmp_path / "wrong"
    wrong.write_text("a" * 64)
    calls: list[tuple[str | Path, ...]] = [
        ("submit", job), ("logs", "x"), ("cancel", "x"), ("list",), ("status", "x"),
    ]  # fmt: skip
    strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)})
    for call, stranger in zip(calls, [*strangers, *strangers, strangers[0]], strict=True):
        refused = smolvlm(*call, "--address", cluster.dashboard, **stranger)
        assert (refused.returncode, refused.stdout) == (2, ""), call
        assert "the cluster wants its token; set RAY_AUTH_MODE=token" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert {ask(cluster, path, None)[0] for path in ANSWERS} == {401}
    assert {ask(cluster, path, "a" * 64)[0] for path in ANSWERS} == {403}
    assert not (tmp_path / "out").exists()


def test_preflight_names_what_is_wrong_with_a_remedy(
    cluster: LocalCluster, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    output = {"uri": "/proc/nowhere"}
    job = write_job(tmp_path, tiny_checkpoint, tmp_path / "none", output=output, engine={"gpus": 1})
    arguments = ("preflight", job, "--address", cluster.address, "--secret", "NOT_SET_ANYWHERE", "--json")
    done = smolvlm(*arguments, **cluster.environment())
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    failed = {each["name"]: each for each in found["checks"] if not each["passed"]}
    assert not found["passed"]
    assert set(failed) == {"GPUs", "listing", "destination", "secrets"}
    assert failed["GPUs"]["found"] == "0, the job needs 1"
    assert "nothing found" in failed["listing"]["found"] or "none" in failed["listing"]["found"]
    assert failed["secrets"]["found"] == "not set: NOT_SET_ANYWHERE"
    assert all(each["remedy"] for each in failed.values())
    nodes = {each["node"].partition(":")[0] for each in found["checks"]} - {"cluster"}
    assert nodes == {"127.0.1.1", "127.0.1.2"}


def test_unknown_jobs_and_wrong_addresses(cluster: LocalCluster) -> None:
    for call in (("logs", "nope"), ("logs", "--follow", "nope"), ("cancel", "nope"), ("status", "nope")):
        refused = smolvlm(*call, "--address", cluster.dashboard, **cluster.environment())
        assert (refused.returncode, refused.stdout) == (2, ""), call
        assert f"nope: no such job on {cluster.dashboard}; see `smolvlm list" in refused.stderr
    for address, said in (("http://127.0.0.1:9", "is the cluster up"), ("127.0.0.1:6379", "cluster's dashboard")):
        refused = smolvlm("list", "--address", address)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr


class TestShipping:
    def test_a_package_holds_the_job_and_the_code_and_is_small(self, tmp_path: Path, tiny_checkpoint: Path) -> None:
        job = spec.load(write_job(tmp_path, tiny_checkpoint, tmp_path)).to_job()
        folder = tmp_path / "package"
        folder.mkdir()
        pack(folder, job, with_code=True)
        assert spec.load(folder / "job.json").to_job() == job
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 2_000_000
        assert not [path for path in folder.rglob("*") if path.suffix in (".pyc", ".safetensors")]
        code = "import jobs, pipeline, smolvlm; print(jobs.__file__, pipeline.__file__, smolvlm.__file__)"
        found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert {Path(name).parents[1] for name in found.stdout.split()} == {folder}

    def test_with_the_package_installed_the_job_travels_alone(self, tmp_path: Path, tiny_checkpoint: Path) -> None:
        job = spec.load(write_job(tmp_path, tiny_checkpoint, tmp_path)).to_job()
        folder = tmp_path / "package"
        folder.mkdir()
        pack(folder, replace(job, name="other"), with_code=False)
        assert [path.name for path in folder.iterdir()] == ["job.json"]

    def test_the_command_of_the_cluster(self) -> None:
        run = "exec python -m jobs run job.json --address auto --max-error-share 0.05"
        assert entrypoint(Shipping(preflight=False)) == run
        checked = entrypoint(Shipping(secrets=("HF_TOKEN", "DB_PASSWORD")))
        names = "--secret HF_TOKEN --secret DB_PASSWORD"
        assert checked == f"python -m jobs preflight job.json --address auto {names} && {run}"

    def test_a_secret_is_named_and_never_given(self) -> None:
        check_names(["HF_TOKEN", "_x1"])
        for wrong in ("HF_TOKEN=hunter2hunter2", "hunter2 hunter2", "hunter2-hunter2"):
            with pytest.raises(ConfigError, match="give the name alone") as error:
                check_names([wrong])
            assert "hunter2" not in str(error.value)

    def test_exit_codes_are_those_of_the_run(self) -> None:
        ended = Submitted("x", "job", "SUCCEEDED", "", "", None, None, 0)
        cases = {("SUCCEEDED", 0): 0, ("FAILED", 3): 3, ("FAILED", 2): 2, ("FAILED", None): 1, ("FAILED", -9): 1}
        cases[("STOPPED", None)] = 130
        for (state, code), expected in cases.items():
            assert exit_code(replace(ended, state=state, exit_code=code), failed=1, interrupted=130) == expected


def test_a_secret_in_a_job_file_goes_nowhere(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Of the twelve secrets these five stand in the job: the other seven are in the environment above."""
    secret = f"canary-{secrets.token_hex(12)}"
    places: list[dict[str, Any]] = [
        {"source": {"uri": f"s3://key:{secret}@bucket/x"}},
        {"source": {"uri": "s3://bucket/x", "endpoint_url": f"https://user:{secret}@host"}},
        {"source": {"uri": f"https://host/list.csv?X-Amz-Signature={secret}"}},
        {"output": {"uri": f"s3://key:{secret}@bucket/x"}},
        {"aws_secret_access_key": secret},
    ]
    for place in places:
        job = write_job(tmp_path, tiny_checkpoint, tmp_path / "images")
        job.write_text(yaml.safe_dump({**yaml.safe_load(job.read_text()), **place}))
        for command in (["submit", str(job)], ["plan", str(job)], ["preflight", str(job)]):
            refused = CliRunner().invoke(app, command)
            assert refused.exit_code == 2
            assert secret not in refused.output
            assert refused.stdout == ""
