"""Tokens to text: put together, the pieces are what decoding everything at once gives."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.endpoint.text import AnswerText, TokenBytes, TokenLogprobs
from smolvlm.vocabulary import train_tokenizer

TOKENIZER = train_tokenizer(512)
TOKEN_BYTES = TokenBytes(TOKENIZER)
TEXT = " Héllo wörld, 日本語\n\t🎉 and 👩‍👩‍👧 \n done.  "


def pieces(token_ids: list[int], *stop: str) -> tuple[list[str], bool]:
    text = AnswerText(TOKEN_BYTES, stop)
    found = []
    for token_id in token_ids:
        found.append(text.push(token_id))
        if text.is_stopped:
            break
    return [*found, text.finish()], text.is_stopped


def test_every_token_decodes_as_the_tokenizer_does() -> None:
    for token_id in range(TOKENIZER.get_vocab_size()):
        expected = TOKENIZER.decode([token_id], skip_special_tokens=True)
        assert TOKEN_BYTES(token_id).decode(errors="replace") == expected


def test_characters_come_whole_and_outer_white_space_not_at_all() -> None:
    found, _ = pieces(TOKENIZER.encode(TEXT).ids)
    assert "".join(found) == TEXT.strip()
    assert not any("\ufffd" in piece for piece in found)
    assert found[-1] == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens_give_what_decoding_at_once_gives(token_ids: list[int]) -> None:
    found, _ = pieces(token_ids)
    assert "".join(found) == TOKENIZER.decode(token_ids, skip_special_tokens=True).strip()


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab \né🎉", max_size=24), st.lists(st.text(alphabet="ab é🎉", min_size=1, max_size=4), max_size=3)
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    found, is_stopped = pieces(TOKENIZER.encode(text).ids, *stop)
    begun = text.lstrip()
    places = [place for each in stop if (place := begun.find(each)) >= 0]
    assert is_stopped == bool(places)
    shown = "".join(found)
    if not places:
        assert shown == text.strip()
    else:
        # Text arrives in tokens: of two stop strings, one that begins later may be complete earlier.
        assert begun.startswith(shown)
        assert not any(each in shown for each in stop)


def test_nothing_of_a_stop_string_is_shown_before_it_is_complete() -> None:
    text = AnswerText(TOKEN_BYTES, ["STOP"])
    shown = ""
    for token_id in TOKENIZER.encode("one STO two ST").ids:
        shown += text.push(token_id)
        assert not shown.endswith(("S", "ST", "STO"))
    assert shown == "one STO two"
    assert text.finish() == " ST"


def test_logprobs_show_tokens_as_bytes() -> None:
    first, second = (TOKENIZER.encode("é").ids)[:2]
    end = TOKENIZER.token_to_id("<end_of_utterance>")
    assert end is not None
    entry = TokenLogprobs(first, -0.5, ((second, -math.inf), (end, -1.0))).to_json(TOKEN_BYTES)
    assert entry["bytes"] == [0xC3]
    assert (entry["token"], entry["logprob"]) == ("\ufffd", -0.5)
    assert entry["top_logprobs"][0]["logprob"] == -9999.0
    assert entry["top_logprobs"][1]["token"] == "<end_of_utterance>"
