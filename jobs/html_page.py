"""Pages that are one file: no scripts, nothing loaded, pictures inside."""

import base64
import hashlib
import io
from html import escape

from PIL import Image


def document(title: str, style: str, body: str) -> str:
    """Return a page that allows itself nothing but its own style and pictures inside it. `body` is markup."""
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'"
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>',
            f"<style>{style}</style></head><body><main>{body}</main></body></html>",
        )
    )


def picture(image: Image.Image, alt: str, max_bytes: int) -> str:
    """Return the image as markup, in `max_bytes` before base64 or as few more as a JPEG of quality 10 needs."""
    kind, data = _encoded(image, max_bytes)
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _encoded(image: Image.Image, max_bytes: int) -> tuple[str, bytes]:
    """Return a format and the bytes: without loss where that is small enough, else as a JPEG of what quality fits."""
    data = _saved(image, "PNG")
    if len(data) <= max_bytes:
        return "png", data
    for quality in (85, 60, 30, 10):
        data = _saved(image, "JPEG", quality=quality)
        if len(data) <= max_bytes:
            break
    return "jpeg", data


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
