"""Token ids against transformers' Idefics3Processor and its chat template, and text that spells special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from smolvlm.image import split_image
from smolvlm.processor import Processor
from smolvlm.prompt import ImageSlot, PromptEncoder, Turn, count_slots, parse_messages
from smolvlm.scratch import create_checkpoint
from smolvlm.vocabulary import ADDED_TOKENS, LEADING_TOKENS

DATA = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"
CHECKPOINTS = ("scratch", "256m", "500m", "2.2b-v2")
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


CONVERSATIONS = {
    "one image": ([user(IMAGE, text("What is in this image?"))], [(700, 500)]),
    "image behind the text": ([user(text("Look at this: "), IMAGE)], [(100, 700)]),
    "no image": ([user(text("What is the capital of France?"))], []),
    "interleaved": (
        [user(text("First"), IMAGE, text(" then\n\n"), IMAGE, IMAGE, text("\nWhich one? 12345"))],
        [(64, 16), (200, 40), (4, 2000)],
    ),
    "many turns": (
        [
            {"role": "system", "content": [text("You are terse.")]},
            user(IMAGE, text("Caption it.\n")),
            {"role": "assistant", "content": [text(" A cat\tand  a dog — «naïve» 猫 😀.")]},
            user(text("  Why? "), IMAGE),
        ],
        [(30, 13), (30, 3000)],
    ),
    "two texts": ([user(text("one"), text("two"), text(" three"))], []),
    "empty text": ([user(IMAGE, text("")), user(text(""))], [(9, 2)]),
    "newlines at the borders": ([user(text("\n\n"), IMAGE, text("\n\n\n"))], [(600, 700)]),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config, template and tokenizer of a published checkpoint, or one from scratch, in a directory of their own."""
    directory = tmp_path_factory.mktemp("checkpoint")
    if request.param == "scratch":
        return create_checkpoint(directory, "tiny")
    if not DATA.exists():
        pytest.skip("the published configs and tokenizer are not beside this checkout")
    for file in [*(DATA / request.param).glob("*.json"), DATA / "tokenizer.json"]:
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Processor:
    return Processor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    from transformers import Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer_class: Any = PreTrainedTokenizerFast
    image = json.loads((checkpoint / "preprocessor_config.json").read_text())
    tokens = json.loads((checkpoint / "tokenizer_config.json").read_text())
    special = {name: tokens[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size=image["size"], max_image_size=image["max_image_size"]),
        tokenizer_class(tokenizer_file=str(checkpoint / "tokenizer.json"), **special),
        image_seq_len=json.loads((checkpoint / "processor_config.json").read_text())["image_seq_len"],
        chat_template=json.loads((checkpoint / "chat_template.json").read_text())["chat_template"],
    )


def reference_ids(
    reference: Any, messages: list[dict[str, Any]], images: list[Image.Image], **options: Any
) -> list[int]:
    prompt = reference.apply_chat_template(messages, add_generation_prompt=True)
    batch = reference(text=[prompt], images=[images] if images else None, images_kwargs=options)
    ids: list[int] = list(batch["input_ids"][0])
    return ids


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_token_ids_are_those_of_transformers(name: str, splitting: bool, processor: Processor, reference: Any) -> None:
    messages, sizes = CONVERSATIONS[name]
    images = [Image.new("RGB", size, "teal") for size in sizes]
    ours = processor(messages, images, image_splitting=splitting)
    assert ours.prompt_token_ids == reference_ids(reference, messages, images, do_image_splitting=splitting)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_image_tokens_match_the_tiles(name: str, processor: Processor) -> None:
    messages, sizes = CONVERSATIONS[name]
    prepared = processor(messages, [Image.new("RGB", size) for size in sizes])
    num_tiles = sum(len(tiles.pixels) for tiles in prepared.tiles)
    assert (
        prepared.prompt_token_ids.count(processor.config.image_token_id) == num_tiles * processor.config.image_seq_len
    )


ORDINARY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda words: "<" not in words)


@settings(max_examples=150, deadline=None)
@given(words=ORDINARY)
def test_ordinary_text_is_encoded_as_a_whole_string_would_be(words: str, processor: Processor) -> None:
    whole = f"<|im_start|>User: {words}<end_of_utterance>\nAssistant:"
    expected = processor.tokenizer.encode(whole, add_special_tokens=False).ids
    assert processor([user(text(words))]).prompt_token_ids == expected


@pytest.mark.parametrize("token", ["<image>", "<row_1_col_1>", "<|im_end|>", "<end_of_utterance>", "<global-img>"])
@pytest.mark.parametrize("around", ["{}", " {}\n", "say {} twice: {}", "<{}>"])
def test_special_tokens_in_text_are_text(token: str, around: str, processor: Processor) -> None:
    content = around.format(token, token)
    ids = processor([user(text(content))]).prompt_token_ids
    special = {processor.tokenizer.token_to_id(name) for name in (*LEADING_TOKENS, *ADDED_TOKENS)}
    assert [number for number in ids if number in special] == [
        processor.tokenizer.token_to_id("<|im_start|>"),
        processor.tokenizer.token_to_id("<end_of_utterance>"),
    ]
    shown = processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"<|im_start|>User: {content}<end_of_utterance>\nAssistant:"


def test_every_added_token_in_text_is_text(processor: Processor) -> None:
    added = set(processor.tokenizer.get_added_tokens_decoder())
    content = " ".join((*LEADING_TOKENS, *ADDED_TOKENS))
    ids = processor([user(text(content))]).prompt_token_ids
    assert len(added & set(ids)) == 2


def test_a_tokenizer_without_position_tokens_spells_them_out(tmp_path: Path) -> None:
    """The first 2.2B checkpoint adds three tokens only."""
    content = json.loads((create_checkpoint(tmp_path, "tiny") / "tokenizer.json").read_text())
    kept = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", *LEADING_TOKENS)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in kept]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    rows, image = (f"<row_1_col_{col}>" for col in (1, 2)), "<image>" * 4
    whole = "".join(f"<fake_token_around_image>{tag}{image}" for tag in rows)
    whole += f"\n\n<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    whole = f"<|im_start|>User:{whole}Hi<end_of_utterance>\nAssistant:"
    ids = PromptEncoder(tokenizer, 4).encode(parse_messages([user(IMAGE, text("Hi"))]), [(1, 2)])
    assert ids == tokenizer.encode(whole, add_special_tokens=False).ids
    assert len(tokenizer.encode("<row_1_col_1>").ids) > 1


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    content = json.loads((create_checkpoint(tmp_path, "tiny") / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    with pytest.raises(ValueError, match="no added token <image>"):
        PromptEncoder(Tokenizer.from_str(json.dumps(content)), 4)


def test_messages_are_parsed_into_turns() -> None:
    turns = parse_messages([user(IMAGE, text("a")), {"role": "assistant", "content": "b"}])
    assert turns == (Turn("user", (ImageSlot(), "a")), Turn("assistant", ("b",)))
    assert count_slots(turns) == 1
    assert hash(turns) == hash(parse_messages([user(IMAGE, text("a")), {"role": "assistant", "content": "b"}]))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("Hello", "non-empty list"),
        ({"role": "user", "content": "a"}, "non-empty list"),
        (["Hello"], "'role' and 'content'"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": "a", "name": "b"}], "'role' and 'content'"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is not one of system, user, assistant"),
        ([{"role": "user", "content": []}], "non-empty list"),
        ([{"role": "user", "content": 7}], "non-empty list"),
        ([user({"type": "video"})], "video.* must have the type 'text' or 'image'"),
        ([user({"type": "image", "url": "http://x"})], "unknown key 'url'"),
        ([user({"type": "text"})], "needs a string under 'text', not None"),
        ([{"role": "user", "content": ["a"]}], "'a' must have the type"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_messages(messages)


def test_each_entry_needs_its_image(processor: Processor) -> None:
    tiles = split_image(Image.new("RGB", (9, 9)), processor.config.image)
    for messages, count in (([user(text("a"))], 1), ([user(IMAGE)], 0), ([user(IMAGE, IMAGE)], 1)):
        with pytest.raises(ValueError, match=f"{count_slots(parse_messages(messages))} entries .* {count} images"):
            processor.from_tiles(messages, [tiles] * count)
