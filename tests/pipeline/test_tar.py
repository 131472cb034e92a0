"""Tar headers: whatever the cut, every whole member before it is found and the cut is never silent."""

import io
import tarfile
from typing import Literal

import pytest
from tars import tar_of

from pipeline.tar import NotATar, TarCut, TarMember, tar_members

_BLOCK = 512


def read(data: bytes) -> tuple[list[TarMember], type[Exception] | None]:
    """Return the members and what ended the reading."""
    found: list[TarMember] = []
    try:
        for member in tar_members(io.BytesIO(data), len(data)):
            found.append(member)
    except (TarCut, NotATar) as error:
        return found, type(error)
    return found, None


MEMBERS = {"a.jpg": b"a" * 700, "b.jpg": b"b" * _BLOCK, "empty.jpg": b"", "c.jpg": b"c" * 3}


def test_members_lie_where_the_headers_say() -> None:
    data = tar_of(MEMBERS.items())
    found, ended = read(data)
    assert ended is None
    assert {m.name: data[m.offset : m.offset + m.size] for m in found} == MEMBERS
    assert all(m.whole for m in found)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_cut_is_found_and_loses_no_whole_member(tar_format: int) -> None:
    data = tar_of(MEMBERS.items(), tar_format)
    whole, _ = read(data)
    end_marker = data.rindex(b"c" * 3) + _BLOCK  # the block after the last member's only one
    for cut in range(end_marker + _BLOCK):
        found, ended = read(data[:cut])
        assert ended is (NotATar if cut < _BLOCK else TarCut), f"silent at byte {cut}"
        assert [m for m in found if m.whole] == [m for m in whole if m.offset + m.size <= cut], f"cut at {cut}"
        assert len(found) - sum(m.whole for m in found) <= 1, f"cut at {cut}"
    assert read(data[: end_marker + _BLOCK]) == (whole, None)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unicode_names(tar_format: int) -> None:
    names = ["deep/" * 60 + "ü.png", "n" * 180 + ".jpg", "日本語.webp"]
    data = tar_of(((name, name.encode()) for name in names), tar_format)
    found, ended = read(data)
    assert ended is None
    assert {m.name: data[m.offset : m.offset + m.size].decode() for m in found} == {name: name for name in names}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_cuts_inside_long_name_headers_are_found(tar_format: int) -> None:
    data = tar_of([("x.jpg", b"x"), ("n" * 300 + ".jpg", b"y")], tar_format)
    end = data.index(bytes(2 * _BLOCK), data.index(b"y" + bytes(20)) + _BLOCK - 1) // _BLOCK * _BLOCK
    for cut in range(_BLOCK, end, 64):
        found, ended = read(data[:cut])
        assert ended is TarCut, f"silent at byte {cut}"
        assert cut < 2 * _BLOCK or [m.name for m in found][:1] == ["x.jpg"]


def test_links_devices_and_directories_are_passed_over() -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, kind in [
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("fifo.jpg", tarfile.FIFOTYPE),
            ("char.jpg", tarfile.CHRTYPE),
            ("block.jpg", tarfile.BLKTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../../etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../outside.jpg")  # a name is a name: nothing is extracted
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
    found, ended = read(target.getvalue())
    assert ended is None
    assert [(m.name, m.size) for m in found] == [("../../outside.jpg", 4)]


def test_an_empty_archive_is_whole() -> None:
    assert read(tar_of([])) == ([], None)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_archive_is_not_read_as_a_tar(mode: Literal["w:gz", "w:bz2", "w:xz"]) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    assert read(target.getvalue()) == ([], NotATar)


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\xff" * 4096])
def test_other_bytes_are_not_a_tar(data: bytes) -> None:
    assert read(data) == ([], NotATar)


def test_a_damaged_header_in_the_middle_is_a_cut() -> None:
    data = bytearray(tar_of(MEMBERS.items()))
    header = bytes(data).index(b"b.jpg")
    data[header : header + _BLOCK] = b"\x7f" * _BLOCK
    found, ended = read(bytes(data))
    assert ([m.name for m in found], ended) == (["a.jpg"], TarCut)
