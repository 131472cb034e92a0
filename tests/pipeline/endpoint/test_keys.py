"""API keys: read, never repeated, and compared whole."""

import base64
import hashlib
import hmac
from pathlib import Path

import pytest

from pipeline.endpoint.keys import ApiKeys
from pipeline.errors import ConfigError

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210é"


@pytest.fixture
def api_keys(tmp_path: Path) -> ApiKeys:
    file = tmp_path / "keys"
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    file.write_text(f"# the team\n{KEY}\n\n  sha256:{digest}  \n")
    return ApiKeys.from_file(file)


def basic(user: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {KEY}".encode(),
        f"bearer   {KEY} ".encode(),
        f"Bearer {OTHER}".encode(),
        basic("any", KEY),
        basic("", KEY),
    ],
)
def test_a_key_opens(api_keys: ApiKeys, header: bytes) -> None:
    assert api_keys.accept(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        KEY.encode(),
        f"Bearer {KEY}x".encode(),
        f"Bearer {KEY[:-1]}".encode(),
        f"Bearer {KEY.upper()}".encode(),
        f"Token {KEY}".encode(),
        f"Bearer sha256:{hashlib.sha256(KEY.encode()).hexdigest()}".encode(),
        f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}".encode(),
        b"Bearer \xff\xfe\x00",
        b"Basic !!!",
        b"Basic " + base64.b64encode(KEY.encode()),
        basic(KEY, ""),
        basic("u", f"{KEY}:x"),
    ],
)
def test_nothing_else_opens(api_keys: ApiKeys, header: bytes | None) -> None:
    assert not api_keys.accept(header)


def test_every_key_is_compared_whichever_fits(api_keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for header in (f"Bearer {KEY}".encode(), f"Bearer {OTHER}".encode(), b"Bearer x", None):
        compared.clear()
        api_keys.accept(header)
        assert len(compared) == 2
        assert all(len(one) == len(other) == 32 for one, other in compared)


def test_the_keys_are_not_kept(api_keys: ApiKeys) -> None:
    assert KEY not in repr(vars(api_keys))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        ("good-key-0123456789\nshort-secret\n", "keys:2: the key has fewer than 16 characters"),
        ("sha256:abcdef\n", "keys:1: not a SHA-256 digest"),
        ("sha256:" + "x" * 64, "keys:1: not a SHA-256 digest"),
    ],
)
def test_mistakes_are_named_and_keys_are_not(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_file(file)
    assert "short-secret" not in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: No such file"):
        ApiKeys.from_file(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        ApiKeys.from_file(tmp_path / "binary")
