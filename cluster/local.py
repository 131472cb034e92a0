"""Several Ray nodes on this machine, for development: what a cluster is, but for the network.

    python -m cluster.local --nodes 3 --cpus 2

The dashboard listens on loopback, every node has a loopback address of its own, and all ask for a token made for this
cluster. It ends with this process.
"""

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_HOST = "127.0.0.1"
_NODE_HOST = "127.0.1.{}"  # all of 127/8 is loopback; Ray replaces 127.0.0.1 by an address that others can reach
_START_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster. `address` is for `smolvlm run --address`, `dashboard` for `smolvlm submit --address`."""

    address: str
    dashboard: str
    token_path: Path
    folder: Path
    pids: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        """Return the variables that let a client in; the token itself stays in its file."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}


@contextmanager
def local_cluster(nodes: int = 1, cpus: int = 2, object_store_bytes: int | None = None) -> Iterator[LocalCluster]:
    """Run `nodes` nodes of `cpus` CPUs until the block ends.

    Raises RuntimeError with their output if one does not start. Workers inherit this process's environment, with the
    credentials for storage in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets with long names cannot be opened
    token_path = folder / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    port, dashboard_port, client_port, *agent_ports = _free_ports(3 + nodes)
    cluster_address = f"{_NODE_HOST.format(1)}:{port}"
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client_port}"]
    head += ["--include-dashboard=true", f"--dashboard-host={_HOST}", f"--dashboard-port={dashboard_port}"]
    starts = [head, *([f"--address={cluster_address}"] for _ in range(nodes - 1))]
    environment = _environment(token_path)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        processes = []
        for number, (start, agent_port) in enumerate(zip(starts, agent_ports, strict=True)):
            options = _node_options(number, folder, cpus, agent_port, object_store_bytes)
            process = stack.enter_context(_node([*start, *options], environment, folder / f"node-{number}.log"))
            processes.append(process)
            if not number:
                _wait_for_head(process, f"http://{_HOST}:{dashboard_port}", token_path, folder / "node-0.log")
        dashboard = f"http://{_HOST}:{dashboard_port}"
        _wait_for_nodes(dashboard, token_path, processes, folder)
        yield LocalCluster(cluster_address, dashboard, token_path, folder, tuple(each.pid for each in processes))


def main() -> None:
    """Run a cluster until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node hands out")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with local_cluster(arguments.nodes, arguments.cpus) as cluster:
        for name, value in cluster.environment().items():
            print(f"export {name}={value}")
        print(f"smolvlm submit JOB.yaml --address {cluster.dashboard}")
        print(f"smolvlm run JOB.yaml --address {cluster.address}", flush=True)
        stop.wait()


def _node_options(number: int, folder: Path, cpus: int, agent_port: int, object_store_bytes: int | None) -> list[str]:
    options = [
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={_NODE_HOST.format(number + 1)}",
        # One a node: nodes that share it delete each other's copies of a job's code.
        f"--temp-dir={folder / str(number)}",
        f"--num-cpus={cpus}",
        f"--dashboard-agent-listen-port={agent_port}",
    ]
    return options + ([] if object_store_bytes is None else [f"--object-store-memory={object_store_bytes}"])


def _environment(token_path: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # A submitted job starts `python`, which has to be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}
    return {**environment, **tokens, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def _node(options: Sequence[str], environment: dict[str, str], log_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `ray start --block`, which takes what it started along when it ends."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_head(process: "subprocess.Popen[bytes]", dashboard: str, token_path: Path, log_path: Path) -> None:
    deadline = time.monotonic() + _START_S
    while _get(f"{dashboard}/api/version", token_path) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the head node did not start; its output:\n{log_path.read_text()[-2000:]}")
        time.sleep(0.2)


def _wait_for_nodes(
    dashboard: str, token_path: Path, processes: Sequence["subprocess.Popen[bytes]"], folder: Path
) -> None:
    deadline = time.monotonic() + _START_S
    while (_get(f"{dashboard}/api/v0/nodes", token_path) or "").count('"ALIVE"') < len(processes):
        if any(each.poll() is not None for each in processes) or time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-1000:] for path in sorted(folder.glob("node-*.log")))
            raise RuntimeError(f"not all of {len(processes)} nodes have joined; their output:\n{logs}")
        time.sleep(0.2)


def _get(url: str, token_path: Path) -> str | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token_path.read_text()}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return str(reply.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    main()
