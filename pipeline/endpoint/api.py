"""OpenAI's chat completions as this endpoint takes them: strict types, unknown fields refused by name.

Fields of the API that this endpoint does not implement are taken with the value that means "not used", so that clients
which always send them work; any other value is refused. Source: https://platform.openai.com/docs/api-reference/chat.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_MESSAGES = 256
MAX_PARTS = 256
MAX_CHOICES = 4
MAX_STOP_CHARS = 256
INT64 = 2**63

Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Strict(BaseModel):
    """What all parts of a request have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """`detail` low shows the model one tile, high splits as the checkpoint does, auto is the endpoint's own policy."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


def _kind(content: Any) -> str:
    return "list" if isinstance(content, list) else "string"


Content = Annotated[Annotated[str, Tag("string")] | Annotated[Parts, Tag("list")], Discriminator(_kind)]
TextContent = Annotated[Annotated[str, Tag("string")] | Annotated[TextParts, Tag("list")], Discriminator(_kind)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: TextContent


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class OwnOptions(Strict):
    """What goes beyond OpenAI's API. `max_tiles` caps the tiles of each image, the whole image being one of them."""

    max_tiles: Annotated[int, Field(ge=1, le=1024)] | None = None


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions. Answers are greedy unless a temperature is given."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    response_format: TextFormat | None = None
    smolvlm: OwnOptions = Field(default_factory=OwnOptions)

    @property
    def stop_strings(self) -> list[str]:
        """All stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def is_streamed(self) -> bool:
        """Whether somebody looks at the answer before it is whole: the client, or the search for stop strings."""
        return bool(self.stream or self.stop)

    @property
    def images(self) -> Iterator[tuple[str, ImageUrl]]:
        """Every image in order, after the place in the request where it stands."""
        for place, message in enumerate(self.messages):
            parts = message.content if isinstance(message.content, list) else []
            for index, part in enumerate(parts):
                if isinstance(part, ImagePart):
                    yield f"messages.{place}.content.{index}.image_url.url", part.image_url

    @property
    def num_text_chars(self) -> int:
        """Characters of all messages together."""
        return sum(len(text) for message in self.messages for text in _texts(message.content))

    def turns(self) -> list[dict[str, Any]]:
        """Return the messages as `Processor` takes them; the images go beside."""
        return [{"role": _role(message.role), "content": _content(message.content)} for message in self.messages]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "smolvlm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Image tokens are prompt tokens; cached are those that an earlier prompt had in common."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TileGrid(BaseModel):
    """How an image was cut: rows × cols tiles and the whole image, or the whole alone where both are 0. Its size in
    pixels is that after EXIF rotation."""

    rows: int
    cols: int
    width: int
    height: int


class Timings(BaseModel):
    """Seconds: until the engine got the prompt, until the first token, until the end."""

    prepare_s: float
    first_token_s: float
    total_s: float
    engine_s: float


class OwnResult(BaseModel):
    """What goes beyond OpenAI's API. `finish_reasons` adds `repetition`, which OpenAI's API calls `length`."""

    tiles: list[TileGrid]
    finish_reasons: list[Literal["stop", "length", "repetition"]]
    timings: Timings


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    smolvlm: OwnResult


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _texts(content: str | list[Any]) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        yield from (part.text for part in content if isinstance(part, TextPart))


def _content(content: str | list[Any]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in content]
