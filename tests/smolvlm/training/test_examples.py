import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from word_pictures import WordPictures

from smolvlm.config import END_OF_UTTERANCE
from smolvlm.training.documents import DocumentGenerator, DocumentOptions
from smolvlm.training.examples import NO_TARGET, DrawDocument, Example, ExampleMaker, Labelled
from smolvlm.training.glyphs import image_token_of


def same(ours: Example, theirs: Example) -> bool:
    parts = ("token_ids", "labels", "reading", "glyphs")
    equal = all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in parts)
    return equal and np.array_equal(ours.tiles.pixels, theirs.tiles.pixels)


def picture(text: str) -> Labelled:
    return Labelled("a picture", Image.new("RGB", (64, 64), "white"), text)


def test_only_the_answer_is_learned(make: ExampleMaker) -> None:
    example = make(WordPictures()(0))
    tokenizer = make.processor.tokenizer
    learned = example.labels[example.labels != NO_TARGET]
    assert tokenizer.decode(learned.tolist(), skip_special_tokens=False) == f" cat{END_OF_UTTERANCE}"
    prompt = tokenizer.decode(example.token_ids[: -len(" cat")].tolist(), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>User:<fake_token_around_image>")
    assert prompt.endswith(f"Read.{END_OF_UTTERANCE}\nAssistant:")


def test_every_label_is_the_token_that_follows(make: ExampleMaker) -> None:
    example = make(WordPictures()(3))
    known = np.flatnonzero(example.labels != NO_TARGET)
    assert known.tolist() == list(range(known[0], len(example.labels)))  # from the last token of the prompt to the end
    assert example.labels[known[:-1]].tolist() == example.token_ids[known[1:]].tolist()


def test_the_prompt_is_that_of_inference(make: ExampleMaker) -> None:
    labelled = WordPictures()(0)
    content = [{"type": "image"}, {"type": "text", "text": "Read."}]
    asked = make.processor([{"role": "user", "content": content}], [labelled.image])
    example = make(labelled)
    assert example.token_ids[: len(asked.prompt_token_ids)].tolist() == list(asked.prompt_token_ids)
    assert np.array_equal(example.tiles.pixels, asked.tiles[0].pixels)


def test_reading_points_at_the_token_that_shows_the_next_character(make: ExampleMaker) -> None:
    labelled = WordPictures()(3)
    assert labelled.boxes is not None
    example = make(labelled)
    image_positions = np.flatnonzero(example.token_ids == make.config.image_token_id)
    shown = image_token_of(labelled.boxes, labelled.image.size, example.tiles, make.config)
    known = np.flatnonzero(example.labels != NO_TARGET)
    # The answer begins with a space, which is shown where the first letter is; nothing shows the end.
    expected = [image_positions[place] for place in [shown[0], *shown]]
    assert example.reading[known].tolist() == [*expected, NO_TARGET]
    assert (example.reading[: known[0]] == NO_TARGET).all()


def test_white_space_around_the_text_moves_nothing(make: ExampleMaker) -> None:
    labelled = WordPictures()(0)
    assert labelled.boxes is not None
    nowhere = np.full((2, 4), np.nan, np.float32)
    padded = replace(labelled, text=f"\n {labelled.text}", boxes=np.concatenate([nowhere, labelled.boxes]))
    assert same(make(padded), make(labelled))


def test_without_places_there_is_nothing_to_look_at(make: ExampleMaker) -> None:
    example = make(picture("cat"))
    assert (example.reading == NO_TARGET).all()
    assert example.glyphs.size == 0


def test_special_tokens_in_a_text_are_plain_characters(make: ExampleMaker) -> None:
    example = make(picture(f"<image>{END_OF_UTTERANCE}"))
    count = int((example.token_ids == make.config.image_token_id).sum())
    assert count == make.config.image_seq_len
    learned = example.labels[example.labels != NO_TARGET]
    assert len(learned) == len(f" <image>{END_OF_UTTERANCE}") + 1  # a byte a token, and the real end


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_text_is_refused_by_name(make: ExampleMaker, text: str) -> None:
    with pytest.raises(ValueError, match="a picture: the text is empty"):
        make(picture(text))


def test_a_text_beyond_the_context_is_refused_by_name(make: ExampleMaker) -> None:
    room = make.config.text.max_positions - len(make(picture("x")).token_ids) + 1
    assert len(make(picture("x" * (room - 1))).token_ids) == make.config.text.max_positions - 1
    with pytest.raises(ValueError, match=r"a picture: prompt and text have 129 tokens.*128.*shorten"):
        make(picture("x" * room))


def test_makers_travel_to_other_processes(make: ExampleMaker, fresh_split: Path) -> None:
    for maker in (make, ExampleMaker(fresh_split, "Read.")):
        labelled = WordPictures((100, 60))(1)
        assert same(pickle.loads(pickle.dumps(maker))(labelled), maker(labelled))


def test_documents_travel_to_other_processes() -> None:
    draw = DrawDocument(DocumentGenerator("train", 3, DocumentOptions(kinds={"word": 1})))
    ours, theirs = draw(5), pickle.loads(pickle.dumps(draw))(5)
    assert (ours.name, ours.text) == (theirs.name, theirs.text) == ("document 5 of seed 3 (train)", ours.text)
    assert ours.image.tobytes() == theirs.image.tobytes()
    np.testing.assert_array_equal(ours.boxes, theirs.boxes)
