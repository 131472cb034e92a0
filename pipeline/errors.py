"""The error tree. What stops a job is an exception; what concerns one image is a `RowError` and becomes a row."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["list", "read", "prepare", "generate"]

CODES = frozenset(
    {
        *("archive_truncated", "archive_invalid", "duplicate_key", "parquet_invalid"),
        *("not_found", "forbidden", "read_failed", "changed", "empty", "truncated", "too_many_bytes"),
        *("not_an_image", "unsupported_format", "too_many_pixels", "decode_failed", "out_of_memory", "quarantined"),
        *("prompt_too_long", "engine_died"),
    }
)
"""Every `RowError.code` there is."""


class PipelineError(Exception):
    """A job cannot go on. The message names the thing, its value and the remedy."""


class ConfigError(PipelineError, ValueError):
    """The job as written cannot run; raised before any actor starts."""


class FingerprintMismatch(ConfigError):
    """The destination holds rows of a different job."""


class LeaseHeld(PipelineError):
    """Another driver is writing to the destination."""


class LeaseLost(PipelineError):
    """Another driver took over the destination while this one was running."""


@dataclass(frozen=True)
class RowError:
    """Why one image has no text. `attempts` counts the reads, or the lives of decoders or engines, spent on it.

    Codes by stage:
      list      archive_truncated, archive_invalid, duplicate_key, unsupported_format, parquet_invalid, codes of read
      read      not_found, forbidden, read_failed, changed, empty, truncated, too_many_bytes
      prepare   the codes of `smolvlm.image.ImageError`, out_of_memory, quarantined
      generate  prompt_too_long, engine_died
    """

    code: str
    stage: Stage
    message: str
    attempts: int = 1


class RowFailure(Exception):
    """Carries a `RowError` up to where the row is made."""

    def __init__(self, error: RowError) -> None:
        super().__init__(error.message)
        self.error = error
