"""Stand-ins of the tests for benchmarks, and a quiet Ray. To be called before anything imports Ray."""

import os
import sys
from pathlib import Path

SUPPORT = str(Path(__file__).resolve().parents[2] / "tests" / "support")


def use_stand_ins() -> None:
    """Let this process and Ray's workers find the tests' stand-ins; Ray reports nothing and asks for no token."""
    sys.path.append(SUPPORT)
    os.environ["PYTHONPATH"] = os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
