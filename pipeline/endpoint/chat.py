"""A chat request on its way: images to tiles, messages to tokens, engine events to text, text to OpenAI's objects."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pipeline.endpoint.api import ChatRequest
from pipeline.endpoint.budget import Take
from pipeline.endpoint.client import EngineClient, EngineRequest, EngineUnavailable, Event, Finished, Refused, TokenOut
from pipeline.endpoint.decoders import DecoderPool
from pipeline.endpoint.errors import ApiError, image_error, unavailable
from pipeline.endpoint.fetch_url import UrlFetcher
from pipeline.endpoint.images import ImageRefused, SplitImage, data_url_bytes, policy_for
from pipeline.endpoint.options import EndpointOptions
from pipeline.endpoint.text import AnswerText, TokenBytes, TokenLogprobs
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput, Processor

SHORT_TEXT_CHARS = 4096

logger = logging.getLogger("smolvlm.endpoint")


@dataclass(frozen=True)
class Piece:
    """What is new of one choice: text, the tokens behind it, and why it ended, once it has."""

    index: int
    text: str = ""
    tokens: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None


@dataclass
class Chat:
    """One request under way, and what there is to say about it in the end. The tiles are the engine's by then."""

    request: ChatRequest
    grids: list[dict[str, int]]
    num_prompt_tokens: int
    started: float
    prepared: float
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    first_token: float | None = None
    engine_s: float = 0.0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Answers that were asked for."""
        return self.request.n or 1

    @property
    def is_waiting(self) -> bool:
        """Whether the first token of a streamed answer is still to come."""
        return self.request.is_streamed and self.first_token is None

    @property
    def is_finished(self) -> bool:
        """Whether all answers have ended."""
        return len(self.finish_reasons) == self.num_choices

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens; image tokens are prompt tokens, and cached are those that an earlier prompt had in common."""
        prompt, done = self.num_prompt_tokens, self.num_output_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens}}

    @property
    def own(self) -> dict[str, Any]:
        """The `smolvlm` object of the answer."""
        moments = {"prepare_s": self.prepared, "first_token_s": self.first_token or 0.0, "total_s": time.monotonic()}
        timings = {name: round(max(0.0, moment - self.started), 6) for name, moment in moments.items()}
        reasons = [reason for _, reason in sorted(self.finish_reasons.items())]
        return {
            "tiles": self.grids,
            "finish_reasons": reasons,
            "timings": {**timings, "engine_s": round(self.engine_s, 6)},
        }


class ChatService:
    """Everything that stands between a checked request and the engines. Safe for many requests on one event loop."""

    def __init__(
        self, options: EndpointOptions, processor: Processor, decoders: DecoderPool, client: EngineClient
    ) -> None:
        image = options.image
        self.options = options
        self.client = client
        self.token_bytes = TokenBytes(processor.tokenizer)
        self._processor = processor
        self._decoders = decoders
        self._fetcher = UrlFetcher(options.allowed_image_hosts, image.max_bytes, image.timeout_s)

    async def prepare(self, request: ChatRequest, take_tiles: Take) -> tuple[Chat, EngineRequest]:
        """Make the engine's request of a client's. Raises ApiError for what this endpoint does not take."""
        started = time.monotonic()
        _check(request, self.options)
        images = await self._split(request, take_tiles)
        tiles = [image.tiles for image in images]
        model_input = await self._tokenised(request, tiles)
        if len(model_input.prompt_token_ids) >= self._processor.config.text.max_positions:
            raise _too_long()
        engine_request = EngineRequest(
            model_input,
            max_new_tokens=_max_tokens(request, self.options),
            is_streamed=request.is_streamed,
            n=request.n or 1,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            top_logprobs=request.top_logprobs or 0,
        )
        grids = [_grid(image) for image in images]
        return Chat(request, grids, len(model_input.prompt_token_ids), started, time.monotonic()), engine_request

    async def answer(self, chat: Chat, engine_request: EngineRequest) -> AsyncGenerator[Piece]:
        """Give the answer in pieces as it comes. Raises ApiError; closing it frees the engine."""
        texts = [AnswerText(self.token_bytes, chat.request.stop_strings) for _ in range(chat.num_choices)]
        batches = self.client.stream(engine_request)
        del engine_request  # an answer takes a while, and this held its tiles
        async with aclosing(batches):
            while (events := await self._next(batches, chat)) is not None:
                for piece in _pieces(chat, texts, events):
                    yield piece
                if chat.is_finished:
                    return
        raise unavailable()  # the engine's events ended before the answer did

    async def _tokenised(self, request: ChatRequest, tiles: list[Tiles]) -> ModelInput:
        """A thread is worth its while for a text that would keep all other requests waiting."""
        if request.num_text_chars < SHORT_TEXT_CHARS:
            return self._processor.from_tiles(request.turns(), tiles)
        return await asyncio.to_thread(self._processor.from_tiles, request.turns(), tiles)

    async def _split(self, request: ChatRequest, take_tiles: Take) -> list[SplitImage]:
        images: list[SplitImage] = []
        room = self.options.limits.max_tiles
        for place, image in request.images:
            try:
                data = await self._bytes(image.url)
                policy = policy_for(self._decoders.policy, image.detail, request.smolvlm.max_tiles)
                images.append(await self._decoders.split(data, policy))
            except ImageRefused as refused:
                raise image_error(refused.code, place) from None
            take_tiles(len(images[-1].tiles.pixels))
            room -= len(images[-1].tiles.pixels)
            if room < 0:
                raise ApiError(
                    400, "too_many_tiles", f"{place}: the images make more than {self.options.limits.max_tiles} tiles; "
                    "use fewer or smaller ones, detail low, or smolvlm.max_tiles", place,
                )  # fmt: skip
        return images

    async def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return data_url_bytes(url, self._decoders.max_bytes)
        return await self._fetcher.fetch(url)

    async def _next(self, batches: AsyncGenerator[list[Event]], chat: Chat) -> list[Event] | None:
        """The next events, None after the last, within the time that the request has."""
        limits = self.options.limits
        deadline = chat.started + limits.request_timeout_s
        if chat.is_waiting:
            deadline = min(deadline, chat.prepared + limits.first_token_timeout_s)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                events = await anext(batches, None)
        except EngineUnavailable as error:
            logger.warning("%s: no engine: %s", chat.id, error.__cause__ or error)
            raise unavailable() from None
        except TimeoutError:
            logger.warning("%s: no answer within its time", chat.id)
            raise _timed_out(chat) from None
        if chat.is_waiting:
            chat.first_token = time.monotonic()
        return events


def _grid(image: SplitImage) -> dict[str, int]:
    return {"rows": image.tiles.rows, "cols": image.tiles.cols, "width": image.width, "height": image.height}


def _pieces(chat: Chat, texts: Sequence[AnswerText], events: Iterable[Event]) -> Iterator[Piece]:
    for event in events:
        if isinstance(event, Refused):
            raise _too_long()
        piece = _piece(chat, texts[event.choice], event)
        if piece is not None:
            yield piece


def _piece(chat: Chat, text: AnswerText, event: TokenOut | Finished) -> Piece | None:
    if event.choice in chat.finish_reasons:  # it was cut at a stop string, and the engine went on
        return None
    if isinstance(event, Finished):
        chat.engine_s = max(chat.engine_s, event.engine_s)
        if chat.first_token is None:  # a whole answer comes at once
            chat.first_token = chat.prepared + event.first_token_s
        chat.num_cached_tokens = max(chat.num_cached_tokens, event.cached_tokens)
        chat.finish_reasons[event.choice] = event.reason
        return Piece(event.choice, text.finish(), (), event.reason)
    chat.num_output_tokens += 1
    tokens = (TokenLogprobs(*event[1:]),) if chat.request.logprobs else ()
    new = text.push(event.token_id)
    if text.is_stopped:
        chat.engine_s = max(chat.engine_s, time.monotonic() - chat.prepared)
        chat.finish_reasons[event.choice] = "stop"
        return Piece(event.choice, new + text.finish(), tokens, "stop")
    return Piece(event.choice, new, tokens) if new or tokens else None


def _check(request: ChatRequest, options: EndpointOptions) -> None:
    """What types alone do not say about a request."""
    limits = options.limits
    if request.model != options.model_name:
        message = f"the model does not exist; this endpoint serves {options.model_name}"
        raise ApiError(404, "model_not_found", message, "model")
    if request.num_text_chars > limits.max_text_chars:
        message = f"messages: the texts have more than {limits.max_text_chars} characters"
        raise ApiError(400, "string_above_max_length", message, "messages")
    if sum(1 for _ in request.images) > limits.max_images:
        raise ApiError(400, "too_many_images", f"messages: more than {limits.max_images} images", "messages")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "invalid_value", "give max_tokens or max_completion_tokens, not both", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs to be true", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "invalid_value", "stream_options needs stream to be true", "stream_options")


def _max_tokens(request: ChatRequest, options: EndpointOptions) -> int:
    limits = options.limits
    name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
    asked = request.max_tokens or request.max_completion_tokens
    if asked is None:
        return min(limits.default_output_tokens, limits.max_output_tokens)
    if asked > limits.max_output_tokens:
        raise ApiError(400, "invalid_value", f"{name}: at most {limits.max_output_tokens} tokens", name)
    return asked


def _too_long() -> ApiError:
    message = "messages: texts and images together exceed the model's context; shorten them, or use fewer tiles"
    return ApiError(400, "context_length_exceeded", message, "messages")


def _timed_out(chat: Chat) -> ApiError:
    if chat.is_waiting:
        return unavailable()
    return ApiError(504, "timeout", "the answer took too long")
