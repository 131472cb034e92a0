"""Where a checkpoint lies: in a directory, inside this package, or at a pinned revision on the Hugging Face hub."""

import re
from pathlib import Path

BUNDLED = "bundled"
BUNDLED_DIRECTORY = Path(__file__).parent / "assets" / "ocr"
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

# Nothing that can run code: no pickled weights, no Python files. The index of the weights and the tokenizer are JSON.
ALLOWED_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


def resolve_checkpoint(model_id: str, revision: str | None = None) -> Path:
    """Give the directory that holds the checkpoint `model_id`, downloading it from the hub if need be.

    `model_id` is a directory, `bundled`, or a hub name such as `HuggingFaceTB/SmolVLM-256M-Instruct`, for which
    `revision` must be a full commit hash: a branch may change between two runs of one job.
    Raises ValueError where none of these fits.
    """
    directory = Path(model_id)
    if model_id and directory.is_dir():
        return directory
    if model_id == BUNDLED:
        return _bundled()
    if not HUB_ID.fullmatch(model_id):
        raise ValueError(f"model {model_id!r} is neither an existing directory nor a hub name of the form owner/name")
    if revision is None or not COMMIT.fullmatch(revision):
        raise ValueError(
            f"model {model_id!r}: revision {revision!r} does not pin a commit; give the 40-digit commit hash that the "
            "model's page shows under 'Files and versions'"
        )
    return _download(model_id, revision)


def _bundled() -> Path:
    if not (BUNDLED_DIRECTORY / "config.json").exists():
        raise ValueError(
            "model 'bundled': this installation carries no checkpoint; name a directory, or a hub model with a revision"
        )
    return BUNDLED_DIRECTORY


def _download(model_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_id, revision=revision, allow_patterns=ALLOWED_FILES))
