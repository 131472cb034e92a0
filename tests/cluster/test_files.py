"""The files that start clusters: they parse, pin the versions that the project pins, call commands that exist, and hold
no credential."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from jobs.cli import app
from jobs.explain import holds_secret
from jobs.serve import parse as parse_endpoint
from pipeline.control import Board
from pipeline.endpoint.client import EngineStatus
from pipeline.endpoint.metrics import Metrics
from pipeline.errors import CODES
from pipeline.job import Model

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
CLOUDS = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
TEXTS = [path for path in sorted(CLUSTER.rglob("*")) if path.is_file() and path.suffix not in (".py", ".pyc")]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
)
IMAGE = "smolvlm:cuda"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def cluster_spec(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = documents(path)[0]["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def containers(path: Path) -> list[dict[str, Any]]:
    spec = cluster_spec(path)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [each for group in groups for each in group["template"]["spec"]["containers"]]


def test_the_expected_files_are_there() -> None:
    assert [documents(path)[0]["kind"] for path in KUBERAY] == ["RayCluster", "RayJob", "RayService"]
    assert {path.name for path in TEXTS} >= {"Dockerfile", "aws.yaml", "gcp.yaml", "prometheus.yml", "grafana.json"}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_pins_rays_version_and_asks_for_a_token(path: Path) -> None:
    spec = cluster_spec(path)
    assert spec["rayVersion"] == PINNED["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert {each["image"] for each in containers(path)} == {IMAGE}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_groups_scale_between_bounds_and_share_memory(path: Path) -> None:
    spec = cluster_spec(path)
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    fewest = 1 if path.stem == "rayservice" else 0  # an endpoint is always there, a job comes and goes
    for group in spec["workerGroupSpecs"]:
        least = fewest if group["groupName"] == "generate" else 0
        assert (group["minReplicas"], group["replicas"]) == (least, least)
        assert group["maxReplicas"] > least
    for each in containers(path):
        assert each["resources"]["limits"] == each["resources"]["requests"]
        assert "/dev/shm" in [mount["mountPath"] for mount in each["volumeMounts"]]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_gpu_pods_tolerate_gpu_and_spot_taints(path: Path) -> None:
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster_spec(path)["workerGroupSpecs"]}
    generate = groups.pop("generate")
    assert generate["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in [each["key"] for each in generate["tolerations"]]
    for other in groups.values():
        assert "nvidia.com/gpu" not in other["containers"][0]["resources"]["limits"]
        assert "spot" in [each["key"] for each in other["tolerations"]]


OPERATOR = ("app.kubernetes.io/name", "kuberay-operator")
DASHBOARD_CLIENTS = {
    "rayjob": {OPERATOR, ("batch.kubernetes.io/job-name", "smolvlm-job")},
    "rayservice": {OPERATOR},
}


def test_the_dashboard_of_a_cluster_is_on_loopback() -> None:
    path = CLUSTER / "kuberay" / "raycluster.yaml"
    assert cluster_spec(path)["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert "dashboard" not in [port["name"] for port in containers(path)[0]["ports"]]


@pytest.mark.parametrize("name", DASHBOARD_CLIENTS)
def test_a_dashboard_that_the_operator_asks_is_open_to_nobody_else(name: str) -> None:
    path = CLUSTER / "kuberay" / f"{name}.yaml"
    head, policy = cluster_spec(path)["headGroupSpec"], documents(path)[1]
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert (policy["kind"], policy["spec"]["policyTypes"]) == ("NetworkPolicy", ["Ingress"])
    assert policy["spec"]["podSelector"]["matchLabels"] == head["template"]["metadata"]["labels"]
    own, *others = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]}
    assert all(rule["ports"] for rule in others)  # a rule without ports would open them all
    (dashboard,) = [rule for rule in others if {"port": 8265} in rule["ports"]]
    assert dashboard["ports"] == [{"port": 8265}]
    let_in = {pair for each in dashboard["from"] for pair in each["podSelector"]["matchLabels"].items()}
    assert let_in == DASHBOARD_CLIENTS[name]


def test_the_job_of_the_rayjob_is_one_that_the_command_line_takes() -> None:
    spec = documents(CLUSTER / "kuberay" / "rayjob.yaml")[0]["spec"]
    assert_is_command(spec["entrypoint"])
    mounts = [mount["mountPath"] for mount in containers(CLUSTER / "kuberay" / "rayjob.yaml")[0]["volumeMounts"]]
    assert str(Path(shlex.split(spec["entrypoint"])[2]).parent) in mounts


def test_the_service_deploys_an_endpoint_that_validates() -> None:
    path = CLUSTER / "kuberay" / "rayservice.yaml"
    config = yaml.safe_load(documents(path)[0]["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert (config["proxy_location"], application["import_path"]) == ("Disabled", "jobs.serve:application")
    options = parse_endpoint(application["args"]).to_options()
    assert Path(str(options.api_key_file)).parent == Path("/etc/smolvlm")
    assert {"containerPort": options.port, "name": "serve"} in containers(path)[0]["ports"]


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_cloud_files_satisfy_rays_own_schema(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    validate_config({**prepare_config(content), "cluster_synced_files": []})
    assert content["head_node_type"] in content["available_node_types"]
    workers = {name: node for name, node in content["available_node_types"].items() if name != "head"}
    assert {name: node["min_workers"] for name, node in workers.items()} == {"prepare": 0, "generate": 0}
    assert all(node["max_workers"] > 0 for node in workers.values())


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_clouds_ask_for_the_token_and_keep_the_dashboard_at_home(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    starts = [content["head_start_ray_commands"][-1], content["worker_start_ray_commands"][-1]]
    assert all(start.startswith("RAY_AUTH_MODE=token ray start ") for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert content["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert content["docker"]["image"].endswith(f"/{IMAGE}")


def test_the_image_takes_the_pinned_torch_and_the_constraints() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"torch==([\d.]+)", text) == [PINNED["torch"]] * 2
    assert "pip install --no-cache-dir -c constraints.txt '.[serve]'" in text
    assert "ENV RAY_AUTH_MODE=token" in text
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


@pytest.mark.parametrize("path", [*TEXTS, ROOT / "docs" / "cluster.md", ROOT / "README.md"], ids=lambda path: path.name)
def test_every_command_in_a_file_exists(path: Path) -> None:
    for line in re.findall(r"^[#\s]*(?:\w+=\S+ )*(smolvlm [a-z].*)$", path.read_text(), re.MULTILINE):
        assert_is_command(line)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_holds_a_credential(path: Path) -> None:
    text = path.read_text()
    assert not holds_secret(text)
    assert not re.search(r"(?i)(secret_access_key|password|auth_token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}", text)


def assert_is_command(line: str) -> None:
    """The words parse as a call of the command line, as far as that can be told without running it."""
    program, name, *words = shlex.split(line, comments=True)
    assert program == "smolvlm"
    group: Any = get_command(app)
    command = group.commands[name]
    command.make_context(name, [word for word in words if word != "…"])


class TestMetrics:
    """The dashboard shows what exists."""

    def test_every_metric_of_the_dashboard_is_exported(self) -> None:
        content = json.loads((CLUSTER / "grafana.json").read_text())
        shown = {
            name
            for panel in content["panels"]
            for target in panel["targets"]
            for name in re.findall(r"(?:ray_)?smolvlm_\w+", target["expr"])
        }
        assert shown <= self.of_the_endpoint() | self.of_jobs()
        assert self.of_jobs() <= shown

    def test_panels_do_not_overlap(self) -> None:
        panels = json.loads((CLUSTER / "grafana.json").read_text())["panels"]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels)
        assert len({panel["id"] for panel in panels}) == len(panels)

    def test_prometheus_asks_the_port_that_the_endpoint_has(self) -> None:
        content = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
        ray, endpoint = content["scrape_configs"]
        assert ray["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
        assert endpoint["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
        assert endpoint["authorization"]["type"] == "Bearer"

    @staticmethod
    def of_the_endpoint() -> set[str]:
        classes = {"running": 0, "waiting": 0}
        load = {"alive": True, "occupancy": 0.0, "kv_use": 0.0, "online": classes, "batch": classes}
        done = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0}
        status = EngineStatus("engine", 1, Model("m"), load | done, 0, 0)
        text = Metrics().render([status]).decode()
        families = re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
        return {f"{name}_bucket" if kind == "histogram" else name for name, kind in families}

    @staticmethod
    def of_jobs() -> set[str]:
        """What the board exports for everything that the stages count."""
        board = Board()
        board.add(
            "generate", {"ok": 1, "error": 1, "generated": 1, "tokens": 1, "compressed_bytes": 1, "tile_bytes": 1}
        )
        board.add("write", {f"error.{code}": 1 for code in CODES})
        return {f"ray_{name}_total" for name in board._metrics}
