import io
from typing import Any

import pytest
from PIL import Image

from smolvlm.chat import Conversation, Picture, Prompt
from smolvlm.image import ImageError

IMAGE = {"type": "image"}


def picture(name: str = "a.png") -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), "teal").save(buffer, "PNG")
    return Picture.from_bytes(name, buffer.getvalue())


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def answered(conversation: Conversation, count: int, start: int = 1) -> None:
    for number in range(start, start + count):
        conversation.keep(f"q{number}", f"a{number}")


def test_pictures_go_before_the_question_and_stay_in_sight() -> None:
    conversation = Conversation()
    first, second, third = picture("a"), picture("b"), picture("c")
    conversation.show(first)
    conversation.show(second)
    assert conversation.prompt("Which?") == Prompt([user(IMAGE, IMAGE, text("Which?"))], [first, second], None)
    assert conversation.waiting == [first, second]  # asking is not yet an answer
    conversation.keep("Which?", "Both.")
    assert conversation.waiting == []

    conversation.show(third)
    prompt = conversation.prompt("And now?")
    assert prompt.messages == [user(IMAGE, IMAGE, text("Which?")), assistant("Both."), user(IMAGE, text("And now?"))]
    assert prompt.pictures == [first, second, third]


def test_only_the_last_answers_stay_with_their_questions() -> None:
    conversation = Conversation(history=2)
    answered(conversation, 4)
    assert conversation.prompt("q5").messages == [
        user(text("q3")),
        assistant("a3"),
        user(text("q4")),
        assistant("a4"),
        user(text("q5")),
    ]
    conversation.history = 0
    assert conversation.prompt("q5").messages == [user(text("q5"))]
    conversation.history = 100
    assert len(conversation.prompt("q5").messages) == 9


def test_pictures_outlive_their_questions_at_the_front_in_order() -> None:
    conversation = Conversation(history=1)
    pictures = [picture(name) for name in "abc"]
    for number, each in enumerate(pictures, 1):
        conversation.show(each)
        conversation.keep(f"q{number}", f"a{number}")
    prompt = conversation.prompt("q4")
    assert prompt.messages == [user(IMAGE, IMAGE, IMAGE, text("q3")), assistant("a3"), user(text("q4"))]
    assert prompt.pictures == pictures
    conversation.history = 0
    assert conversation.prompt("q4").messages == [user(IMAGE, IMAGE, IMAGE, text("q4"))]


def test_a_question_places_pictures() -> None:
    conversation = Conversation()
    first, second = picture("a"), picture("b")
    conversation.show(first)
    conversation.show(second)
    prompt = conversation.prompt("Is {2} like this?")
    assert prompt.messages == [user(IMAGE, text("Is "), IMAGE, text(" like this?"))]
    assert prompt.pictures == [first, second]
    prompt = conversation.prompt("{2}{1}")
    assert (prompt.messages, prompt.pictures) == ([user(IMAGE, IMAGE)], [second, first])


def test_a_picture_shown_again_is_not_also_at_the_front() -> None:
    conversation = Conversation(history=0)
    first, second = picture("a"), picture("b")
    for each in (first, second):
        conversation.show(each)
        conversation.keep("?", "!")
    prompt = conversation.prompt("Look at {1} again.")
    assert prompt.messages == [user(IMAGE, text("Look at "), IMAGE, text(" again."))]
    assert prompt.pictures == [second, first]


def test_a_number_without_a_picture_is_refused_and_changes_nothing() -> None:
    conversation = Conversation()
    shown = picture()
    conversation.show(shown)
    for wrong in ("{2}", "{0}", "so {99}"):
        with pytest.raises(ValueError, match=r"there is no picture \{\d+\}; 1 have been shown"):
            conversation.prompt(wrong)
    assert (conversation.waiting, conversation.exchanges) == ([shown], [])


def test_reset_forgets_all_but_the_settings() -> None:
    conversation = Conversation(history=3, max_tiles=5)
    conversation.show(picture())
    answered(conversation, 2)
    conversation.show(picture())
    conversation.reset()
    assert conversation.prompt("q") == Prompt([user(text("q"))], [], 5)
    assert (conversation.pictures, conversation.waiting, conversation.history) == ([], [], 3)


def test_settings_out_of_range_are_refused_and_the_old_ones_stay() -> None:
    conversation = Conversation(history=3, max_tiles=5)
    with pytest.raises(ValueError, match="history -1 must be at least 0"):
        conversation.history = -1
    with pytest.raises(ValueError, match="tiles 0 must be at least 1"):
        conversation.max_tiles = 0
    assert (conversation.history, conversation.max_tiles) == (3, 5)
    conversation.max_tiles = None
    assert conversation.prompt("q").max_tiles is None


def test_a_picture_is_an_upright_image_or_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    assert Picture.from_bytes("a.jpg", buffer.getvalue()).image.size == (4, 6)
    with pytest.raises(ImageError, match="no known image format"):
        Picture.from_bytes("a.txt", b"hello there")
