"""Where the images lie inside a tar, found from its headers alone.

Nothing is extracted. Links, devices and directories are passed over. Python's reader stops without a word where a tar
was cut between two members, so the end-of-archive block is checked as well.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BLOCK = 512


@dataclass(frozen=True)
class TarMember:
    """A regular file of a tar: bytes `[offset, offset + size)` of the archive; `whole` if they are all there."""

    name: str
    offset: int
    size: int
    whole: bool


class TarCut(ValueError):
    """The archive ends before its end-of-archive block; what came before is good."""


class NotATar(ValueError):
    """The object does not begin with a tar header."""


def tar_members(file: Any, size: int) -> Iterator[TarMember]:
    """Yield the regular files of an uncompressed tar of `size` bytes, in order.

    Source: POSIX.1-2001 pax and GNU formats as Python's tarfile reads them.
    Raises NotATar before the first member, TarCut after the last one that is there.
    """
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller owns the file)
    except tarfile.TarError as error:
        raise NotATar(f"no tar header at the start ({error})") from error
    last_end = 0
    while True:
        try:
            member = archive.next()
        except tarfile.TarError as error:
            raise TarCut(f"the archive breaks off at byte {size} of at least {last_end} ({error})") from error
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header: a tar can hold millions
        last_end = member.offset_data + member.size
        if member.isreg():
            yield TarMember(member.name, member.offset_data, member.size, last_end <= size)
    if not _ends_with_marker(file, archive.offset):
        raise TarCut(f"no end-of-archive block at byte {archive.offset}: the archive was cut after a whole member")


def _ends_with_marker(file: Any, offset: int) -> bool:
    file.seek(offset)
    return bool(file.read(_BLOCK) == bytes(_BLOCK))
