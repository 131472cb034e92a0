"""`smolvlm chat`: a conversation with pictures on a terminal, or a script of one on standard input.

`img>` takes a picture at a time and is asked again until the line is empty; `txt>` takes the question. On a terminal
there are prompts, line editing and numbers after each answer; otherwise stdout holds the answers and nothing else, and
what is to be told goes to stderr.
"""

import asyncio
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jobs.chat_models import AnswerOptions, ChatModel, LocalModel, NoAnswer, Reply
from jobs.chat_remote import RemoteModel, read_key
from jobs.shortcuts import DEFAULT_MODEL, DEFAULT_REVISION, Options
from jobs.terminal import Terminal
from pipeline.errors import ConfigError
from smolvlm.chat import Conversation, Picture, UnknownPicture
from smolvlm.image import ImageError, ImageLimits
from smolvlm.tiling import num_tiles

URL_TIMEOUT_S = 30.0
REASONS = {
    "length": "cut off at --max-new-tokens",
    "repetition": "stopped because it went in circles",
    "aborted": "stopped",
}


def open_model(options: Options, url: str | None, api_key_file: Path | None) -> ChatModel:
    """Load a model, or reach for the endpoint's. Raises ConfigError where that fails or options contradict."""
    if url is None:
        if api_key_file is not None:
            raise ConfigError("--api-key-file is the key of an endpoint; it needs --url")
        revision = DEFAULT_REVISION if options.model is None else options.revision
        return LocalModel(options.model or DEFAULT_MODEL, revision, options.dtype or "auto", options.quantization)
    if options != Options():
        raise ConfigError(
            "--url talks to the endpoint's own model; leave out --model, --revision, --dtype and --quantization"
        )
    return RemoteModel(url, None if api_key_file is None else read_key(api_key_file))


def talk(model: ChatModel, conversation: Conversation, options: AnswerOptions, allow_urls: bool) -> bool:
    """Chat until the end. Returns False if a script asked for something that could not be done."""
    with closing(model):
        return Chat(model, conversation, options, allow_urls).run()


@dataclass(frozen=True)
class Command:
    """What a line that begins with `/` does."""

    act: Callable[[str], None]
    help: str


class _Restart(Exception):
    """Back to `img>`."""


class Chat:
    """One person, one conversation, one model."""

    def __init__(self, model: ChatModel, conversation: Conversation, options: AnswerOptions, allow_urls: bool) -> None:
        self._model, self._conversation, self._options, self._allow_urls = model, conversation, options, allow_urls
        self._terminal = Terminal()
        self._last: Reply | None = None
        self._complaints = 0
        self._commands = {
            "/reset": Command(self._reset, "forget pictures, questions and answers"),
            "/images": Command(self._list_images, "list the pictures; {N} in a question places picture N"),
            "/history": Command(self._set_history, "N: how many past answers stay in the prompt"),
            "/tiles": Command(self._set_tiles, "N: the most tiles a picture may make, `off` for no cap"),
            "/stats": Command(self._show_stats, "what the last answer cost"),
            "/help": Command(self._help, "this list"),
            "/quit": Command(self._quit, "end, as Ctrl-D does; Ctrl-C ends an answer"),
        }

    def run(self) -> bool:
        """Talk until the end. Returns False if a script asked for something that could not be done."""
        if self._terminal.is_interactive:
            self._terminal.tell(f"{self._model.name}. /help lists what else there is.")
        while True:
            try:
                self._take_images()
                if question := self._line("txt> "):
                    self._ask(question)
            except _Restart:
                continue
            except EOFError:
                return self._end()
            except KeyboardInterrupt:
                if not self._terminal.is_interactive:
                    raise
                self._terminal.show("\n")
                self._terminal.tell("/quit or Ctrl-D ends the chat")

    def _end(self) -> bool:
        if self._terminal.is_interactive:
            self._terminal.show("\n")
            return True
        if waiting := len(self._conversation.waiting):
            self._complain(f"no question followed the last {waiting} pictures")
        return self._complaints == 0

    def _take_images(self) -> None:
        while where := self._line("img> "):
            try:
                picture = Picture.from_bytes(where, self._read(where))
            except (ImageError, NoAnswer) as error:
                self._complain(f"{where}: {error}")
                continue
            self._conversation.show(picture)
            number = len(self._conversation.pictures)
            self._terminal.tell(f"picture {number}: {picture.image.width} × {picture.image.height}")

    def _line(self, prompt: str) -> str:
        """The next line that is not a command."""
        while True:
            line = self._terminal.ask(prompt)
            name, _, argument = line.partition(" ")
            if name in self._commands:
                self._commands[name].act(argument.strip())
            elif name.startswith("/") and name[1:].isalpha() and prompt == "txt> ":
                self._complain(f"{name} is no command; /help lists them")
            else:
                return line

    def _ask(self, question: str) -> None:
        try:
            reply = self._model.answer(self._conversation.prompt(question), self._options, self._terminal.show)
        except (NoAnswer, UnknownPicture) as error:
            self._complain(str(error))
            return
        self._terminal.end_line()
        self._last = reply
        if reply.text:
            self._conversation.keep(question, reply.text)
        if reply.finish_reason in REASONS:
            self._terminal.tell(f"[{REASONS[reply.finish_reason]}]")
        if self._terminal.is_interactive:
            self._terminal.tell(stats_text(reply))

    def _read(self, where: str) -> bytes:
        if where.lower().startswith(("http://", "https://")):
            if not self._allow_urls:
                raise NoAnswer("addresses are fetched only with --allow-urls; give a path")
            return fetch(where)
        return read_file(where)

    def _complain(self, text: str) -> None:
        self._complaints += 1
        self._terminal.tell(text, style="red")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._terminal.tell("forgotten")
        raise _Restart

    def _list_images(self, _: str) -> None:
        waiting = self._conversation.waiting
        for number, picture in enumerate(self._conversation.pictures, 1):
            state = "  for the next question" if picture in waiting else ""
            self._terminal.tell(f"{number}  {picture.name}  {picture.image.width} × {picture.image.height}{state}")
        if not self._conversation.pictures:
            self._terminal.tell("no picture yet")

    def _set_history(self, argument: str) -> None:
        if argument:
            self._set("history", argument)
        self._terminal.tell(f"past answers in the prompt: {self._conversation.history}")

    def _set_tiles(self, argument: str) -> None:
        if argument == "off":
            self._conversation.max_tiles = None
        elif argument:
            self._set("max_tiles", argument)
        most = self._conversation.max_tiles
        self._terminal.tell(
            "tiles of a picture: " + ("as many as the model likes" if most is None else f"at most {most}")
        )

    def _set(self, name: str, argument: str) -> None:
        try:
            setattr(self._conversation, name, int(argument))
        except ValueError as error:
            self._complain(str(error) if argument.lstrip("-").isdigit() else f"{argument!r} is not a number")

    def _show_stats(self, _: str) -> None:
        self._terminal.tell("no answer yet" if self._last is None else stats_text(self._last))

    def _help(self, _: str) -> None:
        for name, command in self._commands.items():
            self._terminal.tell(f"{name:<9} {command.help}")

    def _quit(self, _: str) -> None:
        raise EOFError


def stats_text(reply: Reply) -> str:
    """One line: tiles, tokens in and out, seconds."""
    parts = []
    if reply.grids:
        parts.append("tiles " + ", ".join(_grid_text(*grid) for grid in reply.grids))
    if reply.prompt_tokens is not None:
        kept = "" if reply.cached_tokens is None else f" ({reply.cached_tokens:,} kept from before)"
        parts.append(f"{reply.prompt_tokens:,} tokens in{kept}")
    parts.append(f"{reply.output_tokens:,} out")
    if reply.first_token_s is not None:
        rest_s = reply.total_s - reply.first_token_s
        rate = f", {(reply.output_tokens - 1) / rest_s:,.1f} tokens/s" if reply.output_tokens > 1 and rest_s > 0 else ""
        parts.append(f"first after {reply.first_token_s:.2f} s, all after {reply.total_s:.2f} s{rate}")
    return " · ".join(parts)


def _grid_text(rows: int, cols: int) -> str:
    return f"{rows}×{cols}+1 = {num_tiles(rows, cols)}" if rows else "1"


def read_file(where: str) -> bytes:
    """The bytes of a file named as people and file managers write paths: with ~, quotes or backslashes.

    Raises NoAnswer saying what is wrong with it.
    """
    try:
        path = Path(where).expanduser()
        if not path.exists():
            path = Path(_unquoted(where)).expanduser()
        if not path.exists():
            raise NoAnswer("no such file")
        if not path.is_file():
            raise NoAnswer("not a file")
        if path.stat().st_size > ImageLimits().max_bytes:
            raise NoAnswer(f"larger than {ImageLimits().max_bytes:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from None
    except (RuntimeError, ValueError) as error:  # ~nobody, or a NUL
        raise NoAnswer(str(error)) from None


def fetch(url: str) -> bytes:
    """The bytes behind an address of the internet; none inside a network, no redirects. Raises NoAnswer."""
    from pipeline.endpoint.errors import IMAGE_MESSAGES
    from pipeline.endpoint.fetch_url import UrlFetcher
    from pipeline.endpoint.images import ImageRefused

    host = urlsplit(url).netloc
    try:
        return asyncio.run(UrlFetcher([host], ImageLimits().max_bytes, URL_TIMEOUT_S).fetch(url))
    except ImageRefused as refused:
        raise NoAnswer(IMAGE_MESSAGES[refused.code]) from None


def _unquoted(where: str) -> str:
    try:
        words = shlex.split(where)
    except ValueError:
        return where
    return words[0] if len(words) == 1 else where
