import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolvlm.cpu import build
from smolvlm.cpu.build import NoNativeCode, compiler, load, native_library


@pytest.fixture
def fresh() -> Iterator[None]:
    """Each process asks for the library once; here it is asked again."""
    native_library.cache_clear()
    yield
    native_library.cache_clear()


def _cxx() -> str:
    try:
        return compiler()
    except NoNativeCode as reason:
        pytest.skip(str(reason))


def test_it_is_built_once(tmp_path: Path) -> None:
    first = load("resize", _cxx(), tmp_path / "cache")
    (built,) = (tmp_path / "cache").iterdir()
    changed = built.stat().st_mtime_ns
    assert load("resize", _cxx(), tmp_path / "cache")._name == first._name == str(built)
    assert built.stat().st_mtime_ns == changed


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("resize", _cxx(), tmp_path / "cache")
    (tmp_path / "resize.cpp").write_text('extern "C" int answer() { return 42; }', encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert load("resize", _cxx(), tmp_path / "cache").answer() == 42


def test_what_the_compiler_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resize.cpp").write_text("int broken(", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(NoNativeCode, match="expected"):
        load("resize", _cxx(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NoNativeCode, match=r"file/cache.*XDG_CACHE_HOME"):
        load("resize", _cxx(), tmp_path / "file" / "cache")


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NoNativeCode, match="XDG_CACHE_HOME"):
        build.cache_directory()


@pytest.mark.usefixtures("fresh")
def test_a_machine_without_a_compiler_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert native_library("resize") is None
        assert native_library("resize") is None
    assert [record.message for record in caplog.records] == [
        "resize runs without native code, several times slower: no C++ compiler 'no-such-compiler'; "
        "install g++, or name one in CXX"
    ]


@pytest.mark.usefixtures("fresh")
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SMOLVLM_NATIVE", "0")
    assert native_library("resize") is None
    assert caplog.records == []
