"""The page at `/`: one document that holds its style and scripts, so that a browser loads nothing else for it."""

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')


@dataclass(frozen=True)
class Page:
    """The document and its Content-Security-Policy: its own style and scripts by their hashes, its own server alone."""

    html: str
    policy: str

    @property
    def headers(self) -> dict[str, str]:
        """What the server sends along."""
        return {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": self.policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }


@cache
def load_page() -> Page:
    """Put the files of this folder together."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inline(tag: str, name: str) -> str:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert f"</{tag}" not in text, f"{name} would end its own element"
        hashes[tag].append(_hash(text))
        return f"<{tag}>{text}</{tag}>"

    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    html = STYLE.sub(lambda found: inline("style", found[1]), html)
    html = SCRIPT.sub(lambda found: inline("script", found[1]), html)
    return Page(html, _policy(hashes["style"], hashes["script"]))


def _policy(styles: list[str], scripts: list[str]) -> str:
    rules = {
        "default-src": ["'none'"],
        "style-src": styles,
        "script-src": scripts,
        "img-src": ["blob:", "data:"],
        "connect-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        # Text only: what a model or a file name says can never become markup.
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    return "; ".join(" ".join([name, *values]) for name, values in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
