"""A server that speaks the gateway's protocol with answers given beforehand, for what reads them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.page import load_page

MODEL = "SmolVLM-test"


@dataclass
class Endpoint:
    """What it answers with, and what it was asked. `gate` holds the answer back after its first piece until set."""

    pieces: list[str] = field(default_factory=lambda: [" Two", " cats", " & a <b>dog</b>."])
    tiles: list[dict[str, int]] = field(default_factory=lambda: [{"rows": 3, "cols": 4, "width": 1600, "height": 1200}])
    finish_reason: str = "stop"
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    key: str | None = None
    refuse: tuple[int, str, dict[str, str]] | None = None  # status, message, headers
    break_off: bool = False  # close the connection where the answer should end
    files: dict[str, bytes] = field(default_factory=dict)  # what else there is to get, by path
    gate: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    requests: list[tuple[str, dict[str, Any] | None]] = field(default_factory=list)
    went_away: threading.Event = field(default_factory=threading.Event)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the completions asked for."""
        return [body for _, body in self.requests if body is not None]

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The stream as OpenAI cuts it: role, pieces, reason, usage."""
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        deltas: list[dict[str, str]] = [
            {"role": "assistant", "content": ""},
            *({"content": text} for text in self.pieces),
        ]
        for delta in deltas:
            yield {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        # OpenAI's API knows no "repetition".
        reason = "length" if self.finish_reason == "repetition" else self.finish_reason
        yield {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        usage = {"prompt_tokens": 877, "completion_tokens": len(self.pieces), "total_tokens": 877 + len(self.pieces)}
        yield {
            **common,
            "choices": [],
            "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 832}},
            "smolvlm": {"tiles": self.tiles, "finish_reasons": [self.finish_reason]},
        }


@contextmanager
def endpoint(**settings: Any) -> Iterator[Endpoint]:
    """Serve on a free port of the loopback interface; the answers flow at once unless `gate` is cleared."""
    served = Endpoint(**settings)
    served.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        served.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(served: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests.append((self.path, None))
            if self.path == "/":
                page = load_page()
                self._send(200, page.html.encode(), page.headers)
            elif self.path in served.files:
                self._send(200, served.files[self.path], {})
            elif self.path == "/v1/models" and self._is_allowed():
                self._send_json(200, served.models)
            elif self.path != "/v1/models":
                self._refuse(404, f"no route {self.path}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self._is_allowed():
                return
            served.requests.append((self.path, body))
            if served.refuse is not None:
                status, message, headers = served.refuse
                self._refuse(status, message, headers)
                return
            self._stream()

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            try:
                for number, chunk in enumerate(served.chunks()):
                    self._event(json.dumps(chunk))
                    if number == 1:
                        self._wait()
                if not served.break_off:
                    self._event("[DONE]")
            except ConnectionError:
                served.went_away.set()

        def _wait(self) -> None:
            """Comments keep a stream alive; writing them is also how a server notices that its client went away."""
            while not served.gate.wait(0.05):
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()

        def _event(self, data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        def _is_allowed(self) -> bool:
            if served.key is None or self.headers["authorization"] == f"Bearer {served.key}":
                return True
            self._refuse(401, "Incorrect API key provided.")
            return False

        def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            self._send_json(status, {"error": error}, headers)

        def _send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(content).encode(), {"content-type": "application/json", **(headers or {})})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Keep quiet."""

    return Handler
