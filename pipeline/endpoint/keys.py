"""API keys: kept as digests, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from pipeline.errors import ConfigError

MIN_CHARS = 16
_DIGEST_PREFIX = "sha256:"


class ApiKeys:
    """The keys that open the endpoint. The keys themselves are not kept."""

    def __init__(self, digests: tuple[bytes, ...]) -> None:
        self._digests = digests

    @classmethod
    def from_file(cls, path: str | Path) -> "ApiKeys":
        """Read one key a line: the key, or `sha256:` and its digest in hex. Empty lines and `#` lines are skipped.

        Raises ConfigError naming file and line, never the key.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise ConfigError(f"api_key_file {path}: {reason}; give a text file with one key a line") from None
        kept = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        digests = tuple(_digest(line, f"{path}:{number}") for number, line in kept if line and not line.startswith("#"))
        if not digests:
            raise ConfigError(f"api_key_file {path}: holds no key; put one on a line of its own")
        return cls(digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Whether the Authorization header carries a key: `Bearer KEY`, or `Basic` with it as the password, which is
        how a browser sends it."""
        presented = _presented(authorization)
        digest = hashlib.sha256(presented).digest()
        # All are compared, whichever fits: the time says nothing about which.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return bool(presented) and any(matches)


def _presented(authorization: bytes | None) -> bytes:
    scheme, _, value = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _digest(line: str, place: str) -> bytes:
    if not line.startswith(_DIGEST_PREFIX):
        if len(line) < MIN_CHARS:
            raise ConfigError(f"api_key_file {place}: the key has fewer than {MIN_CHARS} characters; use a longer one")
        return hashlib.sha256(line.encode()).digest()
    try:
        digest = bytes.fromhex(line.removeprefix(_DIGEST_PREFIX))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"api_key_file {place}: not a SHA-256 digest; write sha256: and 64 hex digits")
    return digest
