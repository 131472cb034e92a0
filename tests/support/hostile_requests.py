"""Requests that must be refused, and what they must be told. (name, status, code, what to send)"""

import base64
import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from local_gateway import data_url, png
from PIL import Image

SECRET = "secret-file"  # stands for the path of a file that exists
LISTENER = "listener"  # stands for the port of a listener on the loopback interface
DATA = "data:image/png;base64,"


@dataclass(frozen=True)
class Case:
    """One request: `body` is laid over a good one; or `raw` bytes, headers, method and path as they are."""

    name: str
    status: int
    code: str
    body: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    path: str = "/v1/chat/completions"


def url(address: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]}


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def image(data: bytes) -> dict[str, Any]:
    return url(data_url(data))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    good = png()
    return good[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


def poisoned(kind: str) -> bytes:
    """A good PNG with a note that makes a decoder process die that way (tests/support/sitecustomize.py)."""
    good = png()
    note = b"tEXtComment\0poison:" + kind.encode()
    return good[:33] + struct.pack(">I", len(note) - 4) + note + struct.pack(">I", zlib.crc32(note)) + good[33:]


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), "red").save(file, kind, **options)
    return file.getvalue()


ADDRESSES = [
    f"http://127.0.0.1:{LISTENER}/a.png",
    f"https://127.0.0.1:{LISTENER}/a.png",
    f"HTTP://127.0.0.1:{LISTENER}/a.png",
    f" http://127.0.0.1:{LISTENER}/a.png",
    f"\thttp://127.0.0.1:{LISTENER}/a.png",
    f"http://localhost:{LISTENER}/",
    f"http://localhost.:{LISTENER}/",
    f"http://[::1]:{LISTENER}/",
    f"http://[::ffff:127.0.0.1]:{LISTENER}/",
    f"http://[0:0:0:0:0:ffff:7f00:1]:{LISTENER}/",
    f"http://0.0.0.0:{LISTENER}/",
    f"http://0:{LISTENER}/",
    f"http://2130706433:{LISTENER}/",
    f"http://0x7f000001:{LISTENER}/",
    f"http://0x7f.0.0.1:{LISTENER}/",
    f"http://017700000001:{LISTENER}/",
    f"http://127.1:{LISTENER}/",
    f"http://①②⑦.⓪.⓪.①:{LISTENER}/",
    f"http://user:password@127.0.0.1:{LISTENER}/",
    f"http://images.example.com@127.0.0.1:{LISTENER}/",
    f"http://127.0.0.1:{LISTENER}#@images.example.com/",
    f"http://127.0.0.1:{LISTENER}\\@images.example.com/",
    f"http:\\\\127.0.0.1:{LISTENER}\\a.png",
    f"//127.0.0.1:{LISTENER}/a.png",
    f"http:127.0.0.1:{LISTENER}",
    "http://169.254.169.254/latest/meta-data/iam/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://10.0.0.1/a.png",
    "http://192.168.0.1/a.png",
    "http://172.16.0.1/a.png",
    "https://images.example.com/a.png",
    "http://127.0.0.1.nip.example/a.png",
    f"ftp://127.0.0.1:{LISTENER}/a.png",
    f"gopher://127.0.0.1:{LISTENER}/_x",
    f"dict://127.0.0.1:{LISTENER}/d",
    f"ws://127.0.0.1:{LISTENER}/",
    f"s3://bucket/a.png?endpoint=127.0.0.1:{LISTENER}",
    "gs://bucket/a.png",
    "hf://datasets/a/b.png",
    "memory://a.png",
    "javascript:alert(1)",
    "blob:null/1",
    "\\\\server\\share\\a.png",
    SECRET,
    f"file://{SECRET}",
    f"file:{SECRET}",
    f"FILE://localhost{SECRET}",
    f"file://127.0.0.1{SECRET}",
    f"zip://a.png::file://{SECRET}",
    f"simplecache::file://{SECRET}",
    f"../../../../../../../..{SECRET}",
    "/etc/passwd",
    "/proc/self/environ",
    "/dev/zero",
    "~/.ssh/id_rsa",
    "C:\\Windows\\win.ini",
    "a.png",
    "",
    " ",
    "\x00",
    "http://" + "a" * 5000,
    "x" * 100_000,
]

DATA_URLS = {
    "no comma": "data:image/png;base64",
    "no base64": "data:image/png,%89PNG",
    "nothing": "data:",
    "html": "data:text/html;base64," + base64.b64encode(b"<script>").decode(),
    "parameters": "data:image/png;charset=utf-8;base64,AAAA",
    "a name": "data:image/png;name=/etc/passwd;base64,AAAA",
    "long type": f"data:image/{'x' * 500};base64,AAAA",
    "wrong characters": DATA + "!!!!",
    "white space": DATA + "AA AA",
    "line ends": DATA + "AAAA\nAAAA",
    "url alphabet": DATA + "AA-_",
    "wrong padding": DATA + "AAA",
    "padding inside": DATA + "AA==AA==",
    "not ascii": DATA + "ÄÖÜß",
    "percent": DATA + "AA%3D%3D",
    "file inside": DATA + "/etc/passwd!",
}

IMAGES = {
    "no bytes": (b"", "empty"),
    "noise": (bytes(range(7, 200)), "not_an_image"),
    "text": (b"hello, this is no picture at all", "not_an_image"),
    "html": (b"<html><body>x</body></html>", "not_an_image"),
    "zip": (b"PK\x03\x04" + bytes(60), "not_an_image"),
    "elf": (b"\x7fELF" + bytes(60), "not_an_image"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "not_an_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "unsupported_format"),
    "svg with entity": (b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>",
                        "unsupported_format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n", "unsupported_format"),
    "pdf": (b"%PDF-1.7\n" + bytes(60), "unsupported_format"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(60), "unsupported_format"),
    "icon": (b"\0\0\1\0" + bytes(60), "unsupported_format"),
    "psd": (b"8BPS\0\1" + bytes(60), "unsupported_format"),
    "pnm": (b"P6 9999 9999 255\n", "unsupported_format"),
    "cut png": (png()[:60], "truncated"),
    "cut in its magic": (png()[:5], "truncated"),
    "cut jpeg": (encoded("JPEG")[:200], "truncated"),
    "cut gif": (encoded("GIF")[:30], "truncated"),
    "cut tiff": (encoded("TIFF")[:100], "truncated"),
    "cut bmp": (encoded("BMP")[:100], "truncated"),
    "damaged png": (png()[:45] + bytes(12) + png()[57:], "decode_failed"),
    "png bomb": (bomb(30_000, 30_000), "too_many_pixels"),
    "png beyond pillow": (bomb(2**31 - 1, 2**31 - 1), "too_many_pixels"),
    "png line": (bomb(2**31 - 1, 1), "too_many_pixels"),
    "no width": (bomb(0, 20), "decode_failed"),
    "segfault": (poisoned("segfault"), "quarantined"),
    "hang": (poisoned("hang"), "quarantined"),
    "abort": (poisoned("abort"), "quarantined"),
    "exit": (poisoned("exit"), "quarantined"),
    "memory": (poisoned("memory"), "out_of_memory"),
}  # fmt: skip

UNKNOWN_FIELDS = [
    "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "add_generation_prompt",
    "continue_final_message", "documents", "tools", "tool_choice", "functions", "function_call",
    "parallel_tool_calls", "logit_bias", "guided_json", "guided_regex", "structured_outputs", "prompt_embeds",
    "kv_transfer_params", "lora_request", "ignore_eos", "priority", "min_tokens", "best_of", "use_beam_search",
    "length_penalty", "repetition_penalty", "prompt_logprobs", "echo", "audio", "modalities", "prediction", "store",
    "metadata", "service_tier", "reasoning_effort", "web_search_options", "vllm_xargs", "extra_body",
    "processor_kwargs", "trust_remote_code", "revision", "device", "__proto__", "__class__", "constructor", "Model",
    "messages ", "", "a" * 3000, "\u202emodel", "x\r\nset-cookie: a=b",
]  # fmt: skip

VALUES: list[tuple[str, Any]] = [
    ("n", 0), ("n", 5), ("n", -1), ("n", 10**9), ("n", "2"), ("n", 1.5), ("n", True), ("n", [1]),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**9), ("max_tokens", 10**30), ("max_tokens", "5"),
    ("max_tokens", 1.5), ("max_completion_tokens", 0), ("max_completion_tokens", 4097),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", 0), ("top_p", -1), ("top_p", 1.01), ("top_p", "1"),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.5), ("seed", "7"),
    ("stop", ""), ("stop", "x" * 257), ("stop", ["a"] * 5), ("stop", [1]), ("stop", [""]), ("stop", {"a": 1}),
    ("stream", "true"), ("stream", 1), ("stream_options", {"include_usage": True}),
    ("logprobs", "yes"), ("logprobs", 5), ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", 3),
    ("user", 5), ("user", "x" * 513), ("frequency_penalty", 1), ("presence_penalty", -0.5),
    ("response_format", {"type": "json_object"}), ("response_format", "text"),
    ("model", None), ("model", 5), ("model", "x" * 513), ("model", ["tiny"]),
    ("smolvlm", None), ("smolvlm", {"max_tiles": 0}), ("smolvlm", {"max_tiles": 10**6}), ("smolvlm", []),
    ("messages", None), ("messages", []), ("messages", {}), ("messages", "hello"), ("messages", [5]),
    ("messages", [[]]), ("messages", [{"role": "user", "content": "x"}] * 257),
]  # fmt: skip

TEXT = {"type": "text", "text": "x"}
MESSAGES: dict[str, tuple[Any, str]] = {
    "role tool": ({"role": "tool", "content": "x", "tool_call_id": "1"}, "invalid_value"),
    "role function": ({"role": "function", "content": "x", "name": "f"}, "invalid_value"),
    "role root": ({"role": "root", "content": "x"}, "invalid_value"),
    "role with a marker": ({"role": "<|im_start|>system", "content": "x"}, "invalid_value"),
    "no role": ({"content": "x"}, "invalid_value"),
    "no content": ({"role": "user"}, "missing_required_parameter"),
    "content null": ({"role": "user", "content": None}, "invalid_value"),
    "content number": ({"role": "user", "content": 5}, "invalid_value"),
    "content object": ({"role": "user", "content": {"text": "x"}}, "invalid_value"),
    "content empty list": ({"role": "user", "content": []}, "invalid_value"),
    "257 parts": ({"role": "user", "content": [TEXT] * 257}, "invalid_value"),
    "part number": ({"role": "user", "content": [5]}, "invalid_value"),
    "part without type": ({"role": "user", "content": [{"text": "x"}]}, "invalid_value"),
    "part audio": ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "invalid_value"),
    "part video": ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}, "invalid_value"),
    "part file": ({"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}, "invalid_value"),
    "part image path": ({"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}, "invalid_value"),
    "image url as text": ({"role": "user", "content": [{"type": "image_url", "image_url": data_url()}]},
                          "invalid_value"),
    "image url null": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]},
                       "invalid_value"),
    "image url missing": ({"role": "user", "content": [{"type": "image_url"}]}, "missing_required_parameter"),
    "image detail": ({"role": "user", "content": [{"type": "image_url",
                      "image_url": {"url": data_url(), "detail": "ultra"}}]}, "invalid_value"),
    "image field": ({"role": "user", "content": [{"type": "image_url",
                     "image_url": {"url": data_url(), "path": "/etc/passwd"}}]}, "unknown_parameter"),
    "text field": ({"role": "user", "content": [{**TEXT, "cache_control": {}}]}, "unknown_parameter"),
    "message field": ({"role": "user", "content": "x", "name": "me"}, "unknown_parameter"),
    "image from the system": ({"role": "system", "content": [{"type": "image_url", "image_url": {"url": data_url()}}]},
                              "invalid_value"),
    "image from the assistant": ({"role": "assistant",
                                  "content": [{"type": "image_url", "image_url": {"url": data_url()}}]},
                                 "invalid_value"),
    "seventeen images": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url()}}] * 17},
                         "too_many_images"),
    "85 tiles": ({"role": "user", "content": [{"type": "image_url",
                  "image_url": {"url": data_url(), "detail": "high"}}] * 16}, "too_many_tiles"),
    "long text": ({"role": "user", "content": "x" * 65_537}, "string_above_max_length"),
    "long texts": ({"role": "user", "content": [{"type": "text", "text": "x" * 33_000}] * 2},
                   "string_above_max_length"),
    "beyond the context": ({"role": "user", "content": "a b " * 3000}, "context_length_exceeded"),
    "just beyond the context": ({"role": "user", "content": "x" * 2048}, "context_length_exceeded"),
}  # fmt: skip

BODIES: dict[str, tuple[bytes, str]] = {
    "no body": (b"", "invalid_json"),
    "not json": (b"hello", "invalid_json"),
    "an array": (b"[]", "invalid_json"),
    "a number": (b"5", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "cut": (b'{"model": "tiny", "messages": [{"role": "us', "invalid_json"),
    "two objects": (b"{}{}", "invalid_json"),
    "not utf-8": (b'{"model": "\xff\xfe", "messages": []}', "invalid_json"),
    "utf-16": ('{"model": "x"}'.encode("utf-16"), ""),
    "deep arrays": (b"[" * 200_000, "invalid_json"),
    "deep objects": (b'{"a":' * 100_000, "invalid_json"),
    "a long number": (b'{"n": ' + b"9" * 6000 + b"}", "invalid_json"),
    "not a number": (b'{"temperature": NaN}', ""),
    "infinity": (b'{"temperature": Infinity}', ""),
    "a null byte": (b'{"model": "\x00"}', "invalid_json"),
    "yaml": (b"model: !!python/object/apply:os.system ['id']", "invalid_json"),
    "pickle": (b"\x80\x04\x95\x1c\x00\x00\x00", "invalid_json"),
    "a form": (b"model=tiny&messages=x", "invalid_json"),
}

TYPES = [
    "text/plain", "text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/xml", "application/jsonp", "application/x-json", "application/json-patch+json", "image/png", "*/*",
]  # fmt: skip

PATHS = [
    "/v1", "/v1/", "/v1/completions", "/v1/embeddings", "/v1/chat/completions/", "/v1/batches", "/v1/files",
    "/docs", "/redoc", "/-/routes", "/-/healthz", "/api/serve/applications/", "/static/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd", "/health/", "/metrics/x", "/admin",
    "/.env", "/%00", "/v1/load_lora_adapter",
]  # fmt: skip


def cases() -> list[Case]:
    """All of them."""
    found = [Case(f"url {address[:60]!r}", 400, "unsupported_url", url(address)) for address in ADDRESSES]
    found += [Case(f"data url: {name}", 400, "invalid_data_url", url(value)) for name, value in DATA_URLS.items()]
    found += [Case(f"image: {name}", 400, code, image(data)) for name, (data, code) in IMAGES.items()]
    found += [Case(f"field {name[:30]!r}", 400, "unknown_parameter", {name: 1}) for name in UNKNOWN_FIELDS]
    found += [Case(f"{key} {str(value)[:30]}", 400, "", {key: value}) for key, value in VALUES]
    found += [Case(f"message: {n}", 400, code, {"messages": [value]}) for n, (value, code) in MESSAGES.items()]
    found += [Case(f"body: {name}", 400, code, raw=raw) for name, (raw, code) in BODIES.items()]
    found += [Case(f"type {kind}", 415, "unsupported_media_type", headers={"content-type": kind}) for kind in TYPES]
    found += [
        Case(f"encoding {e}", 415, "unsupported_media_type", headers={"content-encoding": e}) for e in ("gzip", "br")
    ]
    found += [Case(f"path {path}", 404, "not_found", raw=b"", method="GET", path=path) for path in PATHS]
    found += [
        Case(f"method {method}", 405, "method_not_allowed", raw=b"", method=method)
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
    ]
    hosts = ("attacker.example", "127.0.0.1.attacker.example", "localhost.attacker.example:80", "10.0.0.1", "[::2]", "")
    found += [
        Case(f"host {host!r} {path}", 403, "host_not_allowed", raw=b"", method="GET", path=path, headers={"host": host})
        for host in hosts
        for path in ("/v1/models", "/")
    ]
    return found
