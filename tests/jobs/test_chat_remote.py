import json
from pathlib import Path
from typing import Any

import pytest
from local_gateway import LocalEngines, png, running_gateway
from scripted_endpoint import endpoint
from waiting import wait_for

from jobs.chat_models import AnswerOptions, LocalModel, NoAnswer
from jobs.chat_remote import RemoteModel, read_key
from pipeline.endpoint.options import EndpointOptions
from pipeline.engine_worker import EngineWorker
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, Model
from smolvlm.chat import Conversation, Picture

SHORT = AnswerOptions(max_new_tokens=8)


def picture(size: tuple[int, int] = (200, 150), color: str = "teal") -> Picture:
    return Picture.from_bytes("a.png", png(*size, color))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refuse": (429, "busy", {"retry-after": "5"})}, r"refused \(429\): busy; try again in 5 s"),
        ({"refuse": (413, "too large", {})}, r"refused \(413\): too large; show smaller pictures"),
        ({"break_off": True}, "the answer broke off"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_endpoint_that_refuses_costs_one_question(settings: dict[str, Any], message: str) -> None:
    with endpoint(**settings) as server:
        model = RemoteModel(server.url)
        prompt = Conversation().prompt("What?")
        with pytest.raises(NoAnswer, match=message):
            model.answer(prompt, SHORT, lambda _: None)
        server.refuse, server.break_off = None, False
        assert model.answer(prompt, SHORT, lambda _: None).text == "Two cats & a <b>dog</b>."
        model.close()


def test_what_is_not_an_endpoint_is_refused() -> None:
    for models, message in {"[]": "does not speak OpenAI's API", '{"data": []}': "offers no model"}.items():
        with endpoint(models=json.loads(models)) as server, pytest.raises(ConfigError, match=message):
            RemoteModel(server.url)


def test_a_server_that_dies_is_said() -> None:
    with endpoint() as server:
        model = RemoteModel(server.url)
    with pytest.raises(NoAnswer, match="does not answer"):
        model.answer(Conversation().prompt("What?"), SHORT, lambda _: None)
    model.close()


def test_the_gateway_answers_as_the_model_in_this_process_does(tiny_checkpoint: Path) -> None:
    model = Model(str(tiny_checkpoint), dtype="float32")
    worker = EngineWorker(model, EngineOptions(threads=1))
    engines, conversation = LocalEngines(worker), Conversation(history=1, max_tiles=5)
    local = LocalModel(str(tiny_checkpoint), None, "float32")
    with running_gateway(EndpointOptions(model), engines) as gateway:
        remote, counts = RemoteModel(gateway.url), []
        for question, shown in {
            "What is this?": picture(),
            "Which is red, {1} or {2}?": picture((60, 90), "red"),
        }.items():
            conversation.show(shown)
            prompt = conversation.prompt(question)
            here, there = (each.answer(prompt, SHORT, lambda _: None) for each in (local, remote))
            assert (there.text, there.finish_reason) == (here.text, here.finish_reason)
            assert (there.prompt_tokens, there.output_tokens) == (here.prompt_tokens, here.output_tokens)
            assert there.grids == here.grids
            conversation.keep(question, here.text)
            counts.append((there.prompt_tokens, there.cached_tokens))
        (first_prompt, _), (_, second_cached) = counts
        assert first_prompt is not None
        assert second_cached is not None
        assert second_cached >= first_prompt - 16  # the engine behind it keeps the conversation as well

        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        stopped = remote.answer(prompt, AnswerOptions(max_new_tokens=1500), interrupt)
        assert (stopped.finish_reason, stopped.output_tokens) == ("aborted", 1)
        wait_for(lambda: not engines.num_streams, 30)  # the gateway does not go on answering nobody
        with pytest.raises(NoAnswer, match=r"refused \(400\)"):
            remote.answer(conversation.prompt("long " * 2100), SHORT, lambda _: None)
        remote.close()
    local.close()
    worker.close()


def test_keys_are_never_repeated_in_messages(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sha256:00ff\n")
    with pytest.raises(ConfigError, match="holds no key") as refused:
        read_key(file)
    assert "00ff" not in str(refused.value)
    file.write_text("\n# remark\n  sk-one  \nsk-two\n")
    assert read_key(file) == "sk-one"
