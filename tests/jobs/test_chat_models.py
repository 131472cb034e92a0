from collections.abc import Iterator
from pathlib import Path

import pytest
from local_gateway import png

from jobs.chat_models import AnswerOptions, LocalModel, NoAnswer
from smolvlm.chat import Conversation, Picture

SHORT = AnswerOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path) -> Iterator[LocalModel]:
    model = LocalModel(str(tiny_checkpoint), None, "float32")
    yield model
    model.close()


def picture(size: tuple[int, int] = (200, 150), color: str = "teal") -> Picture:
    return Picture.from_bytes("a.png", png(*size, color))


def test_a_local_answer_is_the_engines_and_comes_in_pieces(local: LocalModel, tiny_checkpoint: Path) -> None:
    from smolvlm import Engine, Processor, SamplingParams

    conversation, shown = Conversation(max_tiles=5), picture()
    conversation.show(shown)
    pieces: list[str] = []
    reply = local.answer(conversation.prompt("What is this?"), SHORT, pieces.append)

    processor = Processor.from_pretrained(tiny_checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    expected = processor(messages, [shown.image], longest_edge=64, upscale=False)
    (done,) = Engine.from_pretrained(tiny_checkpoint).generate([expected], SamplingParams(max_new_tokens=8))
    assert reply.text == processor.decode(done.token_ids).strip()
    assert "".join(pieces) == reply.text
    assert len(pieces) > 1
    assert (reply.prompt_tokens, reply.output_tokens, reply.grids) == (done.prompt_tokens, 8, [(2, 2)])
    assert reply.finish_reason == done.finish_reason


def test_keys_and_values_stay_between_turns(local: LocalModel) -> None:
    conversation = Conversation(history=1)
    conversation.show(picture((128, 128), "gold"))
    first = local.answer(conversation.prompt("What is this?"), SHORT, lambda _: None)
    conversation.keep("What is this?", first.text)
    second = local.answer(conversation.prompt("Really?"), SHORT, lambda _: None)
    assert first.prompt_tokens is not None
    assert (first.cached_tokens or 0) < 16  # nothing but the beginning that all prompts share
    assert second.cached_tokens is not None
    assert second.cached_tokens >= first.prompt_tokens - 16  # all of it but the last, unfinished block
    conversation.keep("Really?", second.text)
    third = local.answer(conversation.prompt("And now?"), SHORT, lambda _: None)  # the first answer is gone
    assert third.cached_tokens is not None
    assert third.cached_tokens >= 17 * 4 - 16  # the picture is at the front as before


def test_an_interrupted_local_answer_frees_the_engine(local: LocalModel) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    prompt = Conversation().prompt("Tell me a long story.")
    reply = local.answer(prompt, AnswerOptions(max_new_tokens=1500), show)
    assert reply.finish_reason == "aborted"
    assert reply.text.startswith("".join(pieces[:2]).strip())
    assert 3 <= reply.output_tokens < 1500
    again = local.answer(prompt, SHORT, lambda _: None)
    assert again.text.startswith(pieces[0])
    assert again.total_s < 5


def test_a_conversation_too_long_is_said_with_its_remedy(local: LocalModel) -> None:
    conversation = Conversation()
    with pytest.raises(NoAnswer, match="leave no room for an answer: /tiles and /history"):
        local.answer(conversation.prompt("long " * 2100), SHORT, lambda _: None)
