"""Compile the C++ beside this file for the processor it runs on, once, and keep the result.

One second with g++ or clang++. A library is named after its source, the compiler and every feature of the processor
that the compiler knows, so that machines which share a home directory do not run each other's. Without a compiler the
engine uses torch's own operators and says so in the log. SMOLVLM_NATIVE=0 switches native code off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas")
TIMEOUT_S = 60
logger = logging.getLogger(__name__)


class NoNativeCode(Exception):
    """Native code cannot be had here; the message says why, and what would help."""


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled library, or None where it is switched off or cannot be built, which is logged once."""
    if os.environ.get("SMOLVLM_NATIVE") == "0":
        return None
    try:
        return load(compiler(), cache_directory())
    except NoNativeCode as reason:
        logger.warning("attention on the CPU runs on torch's operators, up to three times slower: %s", reason)
        return None


def compiler() -> str:
    """Path of the C++ compiler: the one that CXX names, else c++.

    Raises:
        NoNativeCode: there is none.
    """
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name)
    if path is None:
        raise NoNativeCode(f"no C++ compiler {name!r}; install g++, or name one in CXX")
    return path


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smolvlm"


def load(cxx: str, directory: Path) -> ctypes.CDLL:
    """The library for this processor, from `directory` or built into it. Several processes may do so at once.

    It is loaded after torch and shares its OpenMP threads.

    Raises:
        NoNativeCode: the compiler, the directory or the loader fails.
    """
    target = directory / f"native-{_fingerprint(cxx)}.so"
    try:
        if not target.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(cxx, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NoNativeCode(f"{target}: {error}; name a writable directory in XDG_CACHE_HOME") from error


def _build(cxx: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        built = Path(directory) / target.name
        _run([cxx, *FLAGS, "-shared", str(SOURCE), "-o", str(built)])
        built.replace(target)


def _fingerprint(cxx: str) -> str:
    """Digest of what the library depends on; the predefined macros tell the compiler's version and the processor."""
    macros = _run([cxx, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    parts = (SOURCE.read_bytes(), macros, torch.__version__.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise NoNativeCode(f"{command[0]} failed: {error.stderr.decode(errors='replace')[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise NoNativeCode(f"{command[0]} took more than {TIMEOUT_S} s") from error
