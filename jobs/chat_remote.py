"""A chat's model behind an endpoint that speaks OpenAI's API."""

import base64
import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from jobs.chat_models import Answering, AnswerOptions, NoAnswer, Reply, Show
from pipeline.errors import ConfigError
from smolvlm.chat import Picture, Prompt
from smolvlm.formats import sniff

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0
REMEDIES = {401: "give its key with --api-key-file", 413: "show smaller pictures", 429: "try again in a moment"}


class RemoteModel:
    """The first model that an endpoint offers. Pictures go along as the files that they are."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Ask the endpoint for its model. Raises ConfigError where it cannot be reached or refuses."""
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout)
        try:
            self.name = self._first_model()
        except NoAnswer as error:
            self._client.close()
            raise ConfigError(str(error)) from error

    def answer(self, prompt: Prompt, options: AnswerOptions, show: Show) -> Reply:
        """See ChatModel."""
        answering = Answering(show)
        told: dict[str, Any] = {"finish_reason": "aborted"}
        try:
            with closing(self._events(_body(self.name, prompt, options))) as events:
                for event in events:
                    told |= _told(event)
                    for choice in event["choices"]:
                        if content := choice["delta"].get("content"):
                            answering.add(content)
        except KeyboardInterrupt:
            told["finish_reason"] = "aborted"
        return answering.reply(**told)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _first_model(self) -> str:
        with self._plain_failures():
            response = self._client.get("/v1/models")
            _check(response)
            names = [str(model["id"]) for model in response.json()["data"]]
        if not names:
            raise NoAnswer(f"{self.url} offers no model")
        return names[0]

    def _events(self, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        with self._plain_failures(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            _check(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                content = json.loads(event.data)
                if "error" in content:
                    raise NoAnswer(content["error"]["message"])
                yield content
        raise NoAnswer(f"the answer broke off: {self.url} closed the connection")

    @contextmanager
    def _plain_failures(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise NoAnswer(f"{self.url} does not answer: {error or type(error).__name__}") from error
        except (httpx2.SSEError, ValueError, KeyError, TypeError) as error:
            raise NoAnswer(f"{self.url} does not speak OpenAI's API: {type(error).__name__}: {error}") from error


def read_key(path: Path) -> str:
    """The first key of a file with one key a line, `#` before remarks. Raises ConfigError, never repeating a key."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    keys = [line for line in lines if line and not line.startswith(("#", "sha256:"))]
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key; put one on a line of its own (a digest opens nothing)")
    return keys[0]


def _body(model: str, prompt: Prompt, options: AnswerOptions) -> dict[str, Any]:
    pictures = iter(prompt.pictures)
    messages = [{**message, "content": _content(message["content"], pictures)} for message in prompt.messages]
    chosen = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    return {
        "model": model,
        "messages": messages,
        "max_tokens": options.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in chosen.items() if value is not None},
        **({} if prompt.max_tiles is None else {"smolvlm": {"max_tiles": prompt.max_tiles}}),
    }


def _content(content: str | list[dict[str, Any]], pictures: Iterator[Picture]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_image_part(next(pictures)) if entry["type"] == "image" else entry for entry in content]


def _image_part(picture: Picture) -> dict[str, Any]:
    kind = str(sniff(picture.data)).lower()
    url = f"data:image/{kind};base64,{base64.b64encode(picture.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _told(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says beside text: usage, and what goes beyond OpenAI's API."""
    told: dict[str, Any] = {}
    for choice in event["choices"]:
        if reason := choice.get("finish_reason"):
            told["finish_reason"] = reason
    if usage := event.get("usage"):
        told["prompt_tokens"], told["output_tokens"] = usage["prompt_tokens"], usage["completion_tokens"]
        told["cached_tokens"] = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    own = event.get("smolvlm") or {}
    if "tiles" in own:
        told["grids"] = [(grid["rows"], grid["cols"]) for grid in own["tiles"]]
    if own.get("finish_reasons"):
        told["finish_reason"] = own["finish_reasons"][0]
    return told


def _check(response: httpx2.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    wait = response.headers.get("retry-after")
    hint = f"try again in {wait} s" if wait else REMEDIES.get(response.status_code)
    raise NoAnswer(f"refused ({response.status_code}): {message}" + (f"; {hint}" if hint else ""))
