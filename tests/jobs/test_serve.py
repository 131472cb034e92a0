"""`smolvlm serve` as a user runs it, and the config for clusters."""

import json
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest
import yaml
from console_script import SMOLVLM
from PIL import Image
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from jobs.serve import application, parse
from pipeline.errors import ConfigError
from smolvlm.hub import BUNDLED

CONFIG = Path(__file__).parents[2] / "cluster" / "serve.yaml"
KEY = "sk-0123456789abcdef"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def environment() -> dict[str, str]:
    """Ray with a token that both processes know, as a user sets it who runs jobs beside an endpoint."""
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def served(tiny_checkpoint: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Run the command until the test ends, and return what it says of itself."""
    (tmp_path / "keys").write_text(KEY)
    command = [SMOLVLM, "serve", "--model", tiny_checkpoint, "--dtype", "float32", "--gpus", "0"]
    command += ["--port", free_port(), "--api-key-file", tmp_path / "keys"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith("{")), "")
    assert line, process.communicate()[1][-3000:]
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopping: requests under way are answered" in err
    assert "Traceback" not in err


@pytest.mark.timeout(400)
def test_requests_and_a_job_beside_them(
    served: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    url = served["url"]
    assert httpx2.get(f"{url}/health", timeout=30).status_code == 200
    assert httpx2.get(f"{url}/v1/models", timeout=30).status_code == 401
    body = {"model": served["model"], "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.json()["usage"]["completion_tokens"] >= 1

    job = write_job(tmp_path, tiny_checkpoint)
    command = [str(SMOLVLM), "run", str(job), "--json", "--address", served["ray_address"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"rows": 6, "ok": 6}.items() <= json.loads(done.stdout).items()
    assert pq.read_table(tmp_path / "out" / "data").num_rows == 6
    metrics = httpx2.get(f"{url}/metrics", headers=headers, timeout=30).text
    rows = [line for line in metrics.splitlines() if line.startswith("smolvlm_engine_batch_rows_total")]
    assert [line.rpartition(" ")[2] for line in rows] == ["6.0"]


def write_job(folder: Path, checkpoint: Path) -> Path:
    (folder / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (20 + number, 30), "green").save(folder / "images" / f"{number}.png")
    content = {
        "name": "beside",
        "source": {"uri": str(folder / "images")},
        "output": {"uri": str(folder / "out")},
        "model": {"id": str(checkpoint), "dtype": "float32"},
        "tasks": [{"name": "caption", "prompt": "What is this?", "max_new_tokens": 4}],
        "engine": {"mode": "shared"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_mistakes_end_with_2_a_message_and_no_traceback(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret")
    good = ("--model", tiny_checkpoint, "--gpus", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mistakes: dict[str, tuple[Any, ...]] = {
            "host 0.0.0.0 is open to other machines, but there are no API keys": (*good, "--host", "0.0.0.0"),
            "`port`: 70000: must be less than or equal to 65535": (*good, "--port", "70000"),
            f"cannot listen on 127.0.0.1:{port}: Address already in use": (*good, "--port", port),
            "keys: No such file or directory": (*good, "--api-key-file", tmp_path / "keys"),
            "short:1: the key has fewer than 16 characters": (*good, "--api-key-file", tmp_path / "short"),
            "`model.id`": ("--model", "/no/such/place"),
            "`model.revision`": ("--model", "owner/model"),
            "`engine.replicas`": (*good, "--replicas", "3", "2"),
        }
        for message, arguments in mistakes.items():
            command = [str(SMOLVLM), "serve", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            assert (done.returncode, done.stdout) == (2, ""), arguments
            assert message in done.stderr
            assert "Traceback" not in done.stderr
            assert "secret" not in done.stderr


QUANTIZED = {"id": BUNDLED, "quantization": "int8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prot": 8000}, "`prot`: unknown key; did you mean `port`?"),
        ({"engine": {"gpus": 1}, "model": QUANTIZED}, "`model.quantization`: \"int8\": 8-bit integers are for CPUs"),
        ({"port": "8000"}, "`port`: \"8000\": must be a whole number"),
        ({"limits": {"max_requests": 0}}, "`limits.max_requests`: 0: must be greater than 0"),
        ({"engine": {"mode": "shared"}}, "`engine.mode`: \"shared\": an endpoint has its own engines"),
        ({"engine": {"prepare_workers": [1, 2]}}, "`engine.prepare_workers`"),
        ({"host": "0.0.0.0"}, "no API keys"),
        ({"allowed_image_hosts": ["https://example.org/"]}, "write a host, example.org"),
        ({"allowed_image_hosts": ["*"]}, "write a host, example.org"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config_are_named(tiny_checkpoint: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"model": {"id": str(tiny_checkpoint)}, **change}).to_options()
    assert message in str(caught.value)


def test_the_config_for_clusters_is_one_that_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (app,) = config.applications
    assert (app.import_path, app.route_prefix) == ("jobs.serve:application", None)
    assert config.proxy_location == "Disabled"
    assert isinstance(application(app.args), Application)
    options = parse(app.args).to_options()
    assert (options.model_name, options.engine.replicas) == ("HuggingFaceTB/SmolVLM-256M-Instruct", (1, 8))
