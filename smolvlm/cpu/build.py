"""Compile the C++ beside this file for the processor it runs on, once, and keep the result.

A few seconds with g++ or clang++. A library is named after its source, the compiler and every feature of the processor
that the compiler knows, so that machines which share a home directory do not run each other's. Without a compiler
Pillow and torch do the work, which the log says. SMOLVLM_NATIVE=0 switches native code off.

Decoder processes import this module: it stays free of torch.
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
from typing import Any

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-Wno-psabi")
THREADS = ("-fopenmp",)  # loaded after torch, it shares torch's threads
# Without contraction a product and a sum round as two operations, as they do in Pillow.
OWN_FLAGS = {"attention": THREADS, "layers": THREADS, "resize": ("-ffp-contract=off",), "pack": ()}
TIMEOUT_S = 60
logger = logging.getLogger(__name__)


class NoNativeCode(Exception):
    """Native code cannot be had here; the message says why, and what would help."""


@cache
def native_library(name: str) -> ctypes.CDLL | None:
    """The library compiled from `name`.cpp, or None: switched off, or it cannot be built, which is logged once."""
    if os.environ.get("SMOLVLM_NATIVE") == "0":
        return None
    try:
        return load(name, compiler(), cache_directory())
    except NoNativeCode as reason:
        logger.warning("%s runs without native code, several times slower: %s", name, reason)
        return None


def declared(
    function: ctypes._NamedFuncPointer, result: type[ctypes._SimpleCData[Any]] | None, *arguments: type
) -> ctypes._NamedFuncPointer:
    """A library's function, told the C types of its result and its arguments."""
    function.argtypes, function.restype = arguments, result
    return function


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
    """Where libraries are kept.

    Raises:
        NoNativeCode: there is no home directory.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smolvlm"
    except RuntimeError as error:
        raise NoNativeCode("this user has no home directory; name a writable one in XDG_CACHE_HOME") from error


def load(name: str, cxx: str, directory: Path) -> ctypes.CDLL:
    """`name`.cpp as a library for this processor, from `directory` or built into it; several processes may at once.

    Raises:
        NoNativeCode: the compiler, the directory or the loader fails.
    """
    source, flags = SOURCES / f"{name}.cpp", (*FLAGS, *OWN_FLAGS[name])
    target = directory / f"{name}-{_fingerprint(source, cxx, flags)}.so"
    try:
        if not target.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(source, cxx, flags, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NoNativeCode(f"{target}: {error}; name a writable directory in XDG_CACHE_HOME") from error


def _build(source: Path, cxx: str, flags: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        built = Path(directory) / target.name
        _run([cxx, *flags, "-shared", str(source), "-o", str(built)])
        built.replace(target)


def _fingerprint(source: Path, cxx: str, flags: tuple[str, ...]) -> str:
    """Digest of what the library depends on."""
    headers = [header.read_bytes() for header in sorted(SOURCES.glob("*.h"))]
    parts = [source.read_bytes(), *headers, " ".join(flags).encode(), _macros(cxx)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:24]


@cache
def _macros(cxx: str) -> bytes:
    """What the compiler predefines: its version, and the features of the processor."""
    return _run([cxx, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
        ).stdout
    except subprocess.CalledProcessError as error:
        raise NoNativeCode(f"{command[0]} failed: {error.stderr.decode(errors='replace')[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise NoNativeCode(f"{command[0]} took more than {TIMEOUT_S} s") from error
