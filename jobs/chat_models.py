"""Who answers in a chat, and what an answer is; the engine in this process is one of the two."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from pipeline.errors import ConfigError, PipelineError
from smolvlm.chat import Picture, Prompt
from smolvlm.image import ImagePolicy, Tiles, split_image

if TYPE_CHECKING:
    from smolvlm import SamplingParams
    from smolvlm.engine import Completion
    from smolvlm.processor import ModelInput

Show = Callable[[str], None]


class NoAnswer(PipelineError):
    """This question gets no answer; the conversation can go on."""


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated; temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost; None is what is not known of it.

    `finish_reason` is stop, length, repetition or aborted. `cached_tokens` of the `prompt_tokens` were not computed
    again. `grids` are the (rows, cols) of each picture's tiles.
    """

    text: str
    finish_reason: str
    output_tokens: int
    first_token_s: float | None
    total_s: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    grids: list[tuple[int, int]] | None = None


class ChatModel(Protocol):
    """What a chat needs."""

    name: str

    def answer(self, prompt: Prompt, options: AnswerOptions, show: Show) -> Reply:
        """Show the answer piece by piece and return it whole. Ctrl-C ends it early: finish_reason is "aborted".

        Raises NoAnswer where there is none, another PipelineError where there will not be any more.
        """

    def close(self) -> None:
        """Let go of everything."""


@dataclass
class Answering:
    """An answer while it comes."""

    show: Show
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    num_pieces: int = 0
    text: str = ""

    def add(self, piece: str) -> None:
        """Take what the next token brings, which may be nothing yet: half a character, a space."""
        self.first = self.first or time.monotonic()
        self.num_pieces += 1
        self.end_with(piece)

    def end_with(self, rest: str) -> None:
        """Take what was held back. An answer begins with its first word, not with the space before it."""
        rest = rest if self.text else rest.lstrip()
        if rest:
            self.text += rest
            self.show(rest)

    def reply(self, finish_reason: str, output_tokens: int | None = None, **known: Any) -> Reply:
        """What it came to."""
        return Reply(
            text=self.text.strip(),
            finish_reason=finish_reason,
            output_tokens=self.num_pieces if output_tokens is None else output_tokens,
            first_token_s=None if self.first is None else self.first - self.started,
            total_s=time.monotonic() - self.started,
            **known,
        )


class LocalModel:
    """An engine in this process, which keeps the keys and values of the conversation between turns."""

    def __init__(self, model: str, revision: str | None, dtype: str, quantization: str | None = None) -> None:
        """Load a checkpoint, onto the GPU where there is one. Raises ConfigError for one that cannot be loaded."""
        import torch

        from pipeline.endpoint.text import TokenBytes
        from smolvlm import Engine, Processor
        from smolvlm.engine import EngineLoop

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor = Processor.from_pretrained(model, revision)
            engine = Engine.from_pretrained(
                model, device, dtype, revision, max_num_sequences=1, quantization=quantization
            )
        except (OSError, ValueError) as error:  # the hub client's own errors are OSErrors
            raise ConfigError(f"model {model!r} cannot be loaded: {error}") from error
        self.name = model
        self._token_bytes = TokenBytes(self._processor.tokenizer)
        self._loop = EngineLoop(engine)
        self._tiles: WeakKeyDictionary[Picture, tuple[int | None, Tiles]] = WeakKeyDictionary()

    def answer(self, prompt: Prompt, options: AnswerOptions, show: Show) -> Reply:
        """See ChatModel."""
        from smolvlm import SamplingParams
        from smolvlm.engine import EngineDied, PromptTooLong

        answering = Answering(show)
        tiles = [self._split(picture, prompt.max_tiles) for picture in prompt.pictures]
        model_input = self._processor.from_tiles(prompt.messages, tiles)
        params = SamplingParams(options.max_new_tokens, options.temperature, options.top_p, options.seed)
        try:
            done = self._generate(model_input, params, answering)
        except PromptTooLong as error:
            message = f"{len(model_input.prompt_token_ids):,} tokens leave no room for an answer"
            raise NoAnswer(f"{message}: /tiles and /history make it shorter, /reset begins anew") from error
        except EngineDied as error:
            raise PipelineError(str(error)) from error
        reason = "aborted" if done is None else done.finish_reason
        cached = None if done is None else done.cached_tokens
        grids = [(each.rows, each.cols) for each in tiles]
        return answering.reply(
            reason, prompt_tokens=len(model_input.prompt_token_ids), cached_tokens=cached, grids=grids
        )

    def close(self) -> None:
        """End the engine's thread."""
        self._loop.close(cancel=True)

    def _generate(
        self, model_input: "ModelInput", params: "SamplingParams", answering: Answering
    ) -> "Completion | None":
        """Run to the end, or to Ctrl-C: None. Raises PromptTooLong and EngineDied."""
        from pipeline.endpoint.text import AnswerText
        from smolvlm.engine import ONLINE

        text, token_ids = AnswerText(self._token_bytes), SimpleQueue[int | None]()
        future = self._loop.submit(model_input, params, ONLINE, lambda token: token_ids.put(token.token_id))
        future.add_done_callback(lambda _: token_ids.put(None))
        try:
            for token_id in iter(token_ids.get, None):
                answering.add(text.push(token_id))
            done = future.result()
        except KeyboardInterrupt:
            future.cancel()
            done = None
        answering.end_with(text.finish())
        return done

    def _split(self, picture: Picture, max_tiles: int | None) -> Tiles:
        """Tiles of a picture, made once: the engine names them by their pixels, and keeps names while they live."""
        known, tiles = self._tiles.get(picture, (None, None))
        if tiles is None or known != max_tiles:
            policy = ImagePolicy(upscale=False, max_tiles=max_tiles)
            tiles = split_image(picture.image, self._processor.config.image, policy)
            self._tiles[picture] = max_tiles, tiles
        return tiles
