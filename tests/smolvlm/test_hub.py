"""Where checkpoints are found. The hub itself is a stand-in that records what it was asked for."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from smolvlm import hub
from smolvlm.hub import resolve_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_pinned_hub_name_is_downloaded_without_code(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    assert resolve_checkpoint("HuggingFaceTB/SmolVLM-256M-Instruct", COMMIT) == tmp_path
    assert [(call["repo_id"], call["revision"]) for call in asked] == [("HuggingFaceTB/SmolVLM-256M-Instruct", COMMIT)]
    patterns = asked[0]["allow_patterns"]
    assert {"*.json", "*.safetensors"} <= set(patterns)
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pkl", "*")) for pattern in patterns)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123456", COMMIT + "0", COMMIT.upper()])
def test_a_hub_name_must_be_pinned(revision: str | None, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="does not pin a commit; give the 40-digit commit hash"):
        resolve_checkpoint("owner/model", revision)
    assert asked == []


@pytest.mark.parametrize("name", ["no/such/directory", "model", "", "../model", "/no/such", "a b/c", "owner/", "a/b/c"])
def test_other_names_are_refused(name: str, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="neither an existing directory nor a hub name"):
        resolve_checkpoint(name, COMMIT)
    assert asked == []


def test_the_bundled_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORY", tmp_path / "ocr")
    with pytest.raises(ValueError, match="carries no checkpoint"):
        resolve_checkpoint("bundled")
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr" / "config.json").write_text("{}")
    assert resolve_checkpoint("bundled") == tmp_path / "ocr"
