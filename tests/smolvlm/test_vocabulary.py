"""The tokenizer from scratch has the published layout, and encodes losslessly."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm.vocabulary import ADDED_TOKENS, LEADING_TOKENS, token_id, train_tokenizer

SMALL = train_tokenizer(512)


def test_ids_have_the_published_order() -> None:
    assert [token_id(SMALL, token) for token in LEADING_TOKENS] == list(range(17))
    assert [token_id(SMALL, token) for token in ADDED_TOKENS] == list(range(512, 640))
    assert SMALL.get_vocab_size() == 640


def test_ids_are_the_published_ones_at_the_published_size() -> None:
    """Ids of the 256M, 500M and SmolVLM2 checkpoints."""
    full = train_tokenizer(49152)
    published = {"<global-img>": 49152, "<row_1_col_1>": 49153, "<row_6_col_6>": 49188, "<image>": 49190}
    published |= {"<fake_token_around_image>": 49189, "<end_of_utterance>": 49279, "<|im_start|>": 1, "<|im_end|>": 2}
    assert {token: full.token_to_id(token) for token in published} == published


def test_training_is_repeatable() -> None:
    assert train_tokenizer(512).to_str() == SMALL.to_str()


def test_it_compresses_and_never_uses_the_fillers() -> None:
    words = "User: What is in this image?"
    tokens = train_tokenizer(4096).encode(words).tokens
    assert len(tokens) < len(words) / 2
    assert not any("unused" in token for token in tokens)


def test_a_blank_line_is_one_token() -> None:
    """The prompt's layout counts on it behind the last row of tiles."""
    assert len(SMALL.encode("\n\n").ids) == 1


def test_each_special_token_is_one_token() -> None:
    for token in (*LEADING_TOKENS, *ADDED_TOKENS):
        assert SMALL.encode(f"a{token}b").ids[1:-1] == [token_id(SMALL, token)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives(words: str) -> None:
    assert SMALL.decode(SMALL.encode(words).ids, skip_special_tokens=False) == words


def test_limits_are_named() -> None:
    with pytest.raises(ValueError, match="num_base_tokens 272 must be at least 273"):
        train_tokenizer(272)
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        token_id(SMALL, "<nothing>")


def test_it_saves_as_plain_json() -> None:
    content = json.loads(SMALL.to_str())
    assert [token["content"] for token in content["added_tokens"]] == [*LEADING_TOKENS, *ADDED_TOKENS]
    assert all(token["special"] for token in content["added_tokens"])
