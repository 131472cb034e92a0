"""What a benchmark ran on, and with what."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def provenance(device: torch.device, *packages: str) -> dict[str, Any]:
    """Hardware, versions and command, for the end of a report."""
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"hardware": hardware(device), "versions": versions, "command": " ".join(["python", *sys.argv])}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
