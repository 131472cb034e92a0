"""Chat messages and image grids → prompt tokens, in the layout that SmolVLM was trained on.

The checkpoint's own template is Jinja, code that came with data; it is not executed. Its fixed layout stands here, and
the tests compare it with the template.

Only the tokens written here are special. Text of users is encoded as ordinary text even where it spells `<image>` or
`<|im_end|>`: a special token always ends a stretch of text, so the stretches between ours are encoded one by one, by a
tokenizer that knows no special tokens. Ordinary text comes out as if the whole string had been encoded at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from smolvlm.config import END_OF_UTTERANCE
from smolvlm.vocabulary import BOS, FAKE, GLOBAL, IMAGE

ROLES = ("system", "user", "assistant")
ENTRY_KEYS = {"text": {"type", "text"}, "image": {"type"}}

Grid = tuple[int, int]  # rows, cols of an image's tiles; (0, 0) where it is not split
Piece = int | str  # a token id, or text to encode


@dataclass(frozen=True)
class ImageSlot:
    """Where an image goes in a message."""


@dataclass(frozen=True)
class Turn:
    """One checked message, hashable. `content` is text and image slots in the order they were given."""

    role: str
    content: tuple[str | ImageSlot, ...]


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Check chat messages: `{"role", "content"}`, content a string or a list of `{"type": "text", "text"}` and
    `{"type": "image"}`. Roles are system, user and assistant. Raises ValueError naming value and remedy."""
    if isinstance(messages, str | bytes | Mapping) or not messages:
        raise ValueError(f"messages must be a non-empty list of messages, not {messages!r}")
    return tuple(_parse_message(message) for message in messages)


def count_slots(turns: Sequence[Turn]) -> int:
    """How many images the messages ask for."""
    return sum(isinstance(part, ImageSlot) for turn in turns for part in turn.content)


class PromptEncoder:
    """Encodes turns with a checkpoint's tokenizer. `image_seq_len` is the number of `<image>` tokens of one tile."""

    def __init__(self, tokenizer: Tokenizer, image_seq_len: int) -> None:
        self._special = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        missing = [token for token in (BOS, END_OF_UTTERANCE, FAKE, IMAGE) if token not in self._special]
        if missing:
            raise ValueError(f"the tokenizer has no added token {', '.join(missing)}; it is not SmolVLM's")
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._tile = [self._special[IMAGE]] * image_seq_len

    def encode(self, turns: Sequence[Turn], grids: Sequence[Grid]) -> list[int]:
        """Give the token ids [L] of the conversation, ready for the assistant's answer. One grid for each image."""
        slots = count_slots(turns)
        if slots != len(grids):
            raise ValueError(
                f"the messages have {slots} entries of type 'image', but {len(grids)} images were given; "
                "give one image for each entry, in order"
            )
        return self._encode(self._conversation(turns, iter(grids)))

    def _encode(self, pieces: Iterator[Piece]) -> list[int]:
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                ids += self._encode_text(text)
                text = ""
            ids.append(piece)
        return ids + self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _conversation(self, turns: Sequence[Turn], grids: Iterator[Grid]) -> Iterator[Piece]:
        yield self._special[BOS]
        for turn in turns:
            yield turn.role.capitalize() + (":" if isinstance(turn.content[0], ImageSlot) else ": ")
            for part in turn.content:
                if isinstance(part, str):
                    yield part
                else:
                    yield from self._image(*next(grids))
            yield self._special[END_OF_UTTERANCE]
            yield "\n"
        yield "Assistant:"

    def _image(self, rows: int, cols: int) -> Iterator[Piece]:
        """`Idefics3Processor.replace_image_token` of transformers: tiles row by row, the global tile last."""
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                yield from (self._special[FAKE], self._tag(f"<row_{row}_col_{col}>"), *self._tile)
            yield "\n"
        if rows:
            yield "\n"
        yield from (self._special[FAKE], self._tag(GLOBAL), *self._tile, self._special[FAKE])

    def _tag(self, tag: str) -> Piece:
        """A tile's position. The first 2.2B checkpoint has no tokens for it and spells it out."""
        return self._special.get(tag, tag)


def _parse_message(message: Mapping[str, Any]) -> Turn:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise ValueError(f"a message has the keys 'role' and 'content', and no others; got {message!r}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, Sequence) or not content:
        raise ValueError(f"the content of a {role} message must be a string or a non-empty list, not {content!r}")
    return Turn(role, tuple(_parse_entry(entry) for entry in content))


def _parse_entry(entry: Mapping[str, Any]) -> str | ImageSlot:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if kind not in ENTRY_KEYS:
        raise ValueError(f"content entry {entry!r} must have the type 'text' or 'image'")
    unknown = set(entry) - ENTRY_KEYS[kind]
    if unknown:
        raise ValueError(
            f"unknown key {sorted(unknown)[0]!r} in a content entry of type {kind!r}; images themselves are passed "
            "beside the messages, in order"
        )
    if kind == "image":
        return ImageSlot()
    text = entry.get("text")
    if not isinstance(text, str):
        raise ValueError(f"a content entry of type 'text' needs a string under 'text', not {text!r}")
    return text
