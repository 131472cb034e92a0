"""OpenAI's error object. Clients get codes and fixed sentences; what went on inside stands in the server's log."""

from collections.abc import Mapping
from typing import Any, Literal

from starlette.responses import JSONResponse

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]

RETRY_AFTER_S = {"rate_limit_exceeded": 1, "engine_unavailable": 5}

# Codes of `smolvlm.image.ImageError` and of the decoder process, in words for the one who sent the image.
IMAGE_MESSAGES = {
    "empty": "the image has no bytes",
    "not_an_image": "these bytes are not an image",
    "unsupported_format": "the image is not JPEG, PNG, WebP, GIF, TIFF or BMP",
    "truncated": "the image file is cut short",
    "too_many_pixels": "the image has too many pixels",
    "too_many_bytes": "the image file is too large",
    "decode_failed": "the image file is damaged",
    "out_of_memory": "decoding the image needs too much memory",
    "quarantined": "the image cannot be decoded: it takes too long or breaks the decoder",
    "invalid_data_url": "a data: URL must look like data:image/png;base64,… with valid base64",
    "unsupported_url": "images must be given as data: URLs",
    "host_not_allowed": "images may not be fetched from this host",
    "fetch_failed": "the image could not be fetched",
}


class ApiError(Exception):
    """An answer other than a completion; becomes the response or, in the middle of a stream, its last event."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def content(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        seconds = RETRY_AFTER_S.get(self.code)
        return {} if seconds is None else {"retry-after": str(seconds)}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.content, self.status, headers={**self.headers, **(headers or {})})


def image_error(code: str, param: str) -> ApiError:
    """The refusal of one image; `param` says where in the request it stands."""
    return ApiError(400, code, f"{param}: {IMAGE_MESSAGES[code]}", param)


def overloaded() -> ApiError:
    """Too many requests at once."""
    return ApiError(429, "rate_limit_exceeded", "too many requests are under way; try again in a moment")


def unavailable() -> ApiError:
    """No engine, or the engine is gone."""
    return ApiError(503, "engine_unavailable", "no engine can answer now; try again in a moment")


def internal_error(request_id: str) -> ApiError:
    """Our own mistake."""
    return ApiError(500, "internal_error", f"the server failed; its log knows more under {request_id}")


def _type(status: int) -> ErrorType:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
