"""The chat as people use it, on a terminal, and as scripts do, through a pipe."""

import base64
import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_gateway import LocalEngines, running_gateway
from PIL import Image
from scripted_endpoint import Endpoint, endpoint
from typer.testing import CliRunner, Result

from jobs.chat import open_model, read_file, stats_text
from jobs.chat_models import AnswerOptions, LocalModel, NoAnswer, Reply
from jobs.chat_remote import RemoteModel, read_key
from jobs.cli import app
from jobs.terminal import completions, printable
from pipeline.endpoint.options import EndpointOptions
from pipeline.engine_worker import EngineWorker
from pipeline.errors import ConfigError
from pipeline.job import EngineOptions, Model
from smolvlm.chat import Conversation, Picture

SMOLVLM = Path(sys.executable).with_name("smolvlm")
Script = Callable[..., Result]
SHORT = AnswerOptions(max_new_tokens=8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    Image.new("RGB", (200, 150), "teal").save(folder / "wide.png")
    Image.new("RGB", (60, 90), "red").save(folder / "high.jpg")
    return folder


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint() as served:
        yield served


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path) -> Iterator[LocalModel]:
    model = LocalModel(str(tiny_checkpoint), None, "float32")
    yield model
    model.close()


class Terminal:
    """A process on a terminal of its own; what a person types and reads."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.fd, slave = pty.openpty()
        self._process = subprocess.Popen(
            [SMOLVLM, "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, wanted: str, timeout_s: float = 60) -> str:
        """Everything up to and including `wanted`."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self._unread:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} never came; there is {self._unread!r}"
            self._unread += self._read()
        before, _, self._unread = self._unread.partition(wanted)
        return before + wanted

    def _read(self) -> str:
        try:
            return os.read(self.fd, 65536).decode()
        except OSError:  # Linux says so when the other side is gone
            raise AssertionError(f"the chat ended; there is {self._unread!r}") from None

    def end(self) -> int:
        code = self._process.wait(30)
        os.close(self.fd)
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def terminal(request: pytest.FixtureRequest, pictures: Path) -> Iterator[Any]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments, folder=pictures))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def script(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """The command with these lines on standard input, in the folder of the pictures."""
    monkeypatch.chdir(pictures)
    return lambda text, *arguments: CliRunner().invoke(app, ["chat", *arguments], input=text)


def picture(size: tuple[int, int] = (200, 150), color: str = "teal") -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return Picture.from_bytes("a.png", buffer.getvalue())


def roles_and_kinds(request: dict[str, Any]) -> list[tuple[str, list[str] | str]]:
    """The messages of a request with images as `image`."""
    return [
        (
            message["role"],
            message["content"]
            if isinstance(message["content"], str)
            else [part.get("text", "image") for part in message["content"]],
        )
        for message in request["messages"]
    ]


def test_a_conversation_on_a_terminal(terminal: Any, server: Endpoint) -> None:
    chat = terminal("--url", server.url)
    assert "SmolVLM-test" in chat.read_until("img> ")
    chat.type("nope.png\n")
    assert "nope.png: no such file" in chat.read_until("img> ")  # told, and asked again
    chat.type("wide.png\n")
    assert "picture 1: 200 × 150" in chat.read_until("img> ")
    chat.type("high.jpg\n")
    chat.read_until("img> ")
    chat.type("\n")
    chat.read_until("txt> ")
    server.gate.clear()
    chat.type("Which is larger?\n")
    chat.read_until("Two")  # streamed: the rest is held back
    assert server.gate.is_set() is False
    server.gate.set()
    answer = chat.read_until("img> ")
    assert " cats & a <b>dog</b>." in answer
    assert "tiles 3×4+1 = 13 · 877 tokens in (832 kept from before) · 3 out · first after" in answer
    chat.type("\x04")
    assert chat.end() == 0
    (request,) = server.asked
    assert roles_and_kinds(request) == [("user", ["image", "image", "Which is larger?"])]


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal: Any, server: Endpoint) -> None:
    server.gate.clear()
    chat = terminal("--url", server.url)
    chat.read_until("img> ")
    chat.type("\n")
    chat.read_until("txt> ")
    chat.type("One?\n")
    chat.read_until("Two")
    chat.type("\x03")
    chat.read_until("[stopped]")
    assert server.went_away.wait(10)
    server.gate.set()
    chat.read_until("img> ")
    chat.type("half a pa\x03")
    chat.read_until("/quit or Ctrl-D ends the chat")
    chat.read_until("img> ")
    chat.type("\n")
    chat.read_until("txt> ")
    chat.type("Two?\n")
    chat.read_until("<b>dog</b>.")
    chat.read_until("img> ")
    chat.type("/quit\n")
    assert chat.end() == 0
    assert roles_and_kinds(server.asked[-1]) == [("user", ["One?"]), ("assistant", "Two"), ("user", ["Two?"])]


def test_tab_completes_paths_also_with_spaces(terminal: Any, server: Endpoint, pictures: Path) -> None:
    chat = terminal("--url", server.url)
    chat.read_until("img> ")
    chat.type(f"{pictures.parent}/my\t")
    chat.read_until("my pictures/")
    chat.type("wi\t\n")
    chat.read_until("picture 1: 200 × 150")


def test_a_model_in_this_process_keeps_the_conversation(terminal: Any, tiny_checkpoint: Path) -> None:
    chat = terminal("--model", str(tiny_checkpoint), "--dtype", "float32", "--max-new-tokens", "8", "--tiles", "5")
    chat.read_until("img> ")
    chat.type("wide.png\n\nWhat is this?\n")
    first = chat.read_until("kept from before)")
    assert "tiles 2×2+1 = 5" in first
    assert "(0 kept from before)" in first
    chat.read_until("img> ")
    chat.type("\nWhich colour?\n")
    second = chat.read_until("kept from before)")
    total, kept = (int(word.strip("(")) for word in second.split("·")[-1].split() if word.strip("(").isdigit())
    assert 5 * 4 < kept < total  # the picture's tokens at least, 4 of each tile
    chat.read_until("img> ")
    chat.type("/quit\n")
    assert chat.end() == 0


def test_a_script_gets_answers_on_stdout_and_the_rest_on_stderr(server: Endpoint, pictures: Path) -> None:
    lines = "wide.png\n'high.jpg'\n\nWhich?\n\nAnd {1}?\n/stats\n/images\n/history\n/tiles\n/help\n"
    command = [SMOLVLM, "chat", "--url", server.url]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=pictures, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Two cats & a <b>dog</b>.\n" * 2
    told = done.stderr.splitlines()
    assert told[:2] == ["picture 1: 200 × 150", "picture 2: 60 × 90"]
    assert told[2].startswith("tiles 3×4+1 = 13 · 877 tokens in (832 kept from before) · 3 out · first after")
    assert told[3:7] == [
        "1  wide.png  200 × 150",
        "2  'high.jpg'  60 × 90",
        "past answers in the prompt: 2",
        "tiles of a picture: as many as the model likes",
    ]
    assert [line.split()[0] for line in told[7:]] == [
        "/reset", "/images", "/history", "/tiles", "/stats", "/help", "/quit",
    ]  # fmt: skip
    first, second = server.asked
    assert roles_and_kinds(first) == [("user", ["image", "image", "Which?"])]
    assert roles_and_kinds(second)[1:] == [
        ("assistant", "Two cats & a <b>dog</b>."),
        ("user", ["And ", "image", "?"]),
    ]
    sent = [part["image_url"]["url"] for part in first["messages"][0]["content"][:2]]
    kinds = {"wide.png": "png", "high.jpg": "jpeg"}
    assert sent == [
        f"data:image/{kind};base64,{base64.b64encode((pictures / name).read_bytes()).decode()}"
        for name, kind in kinds.items()
    ]


def test_a_script_that_went_wrong_ends_with_1(server: Endpoint, script: Script) -> None:
    mistakes = {
        "nope.png\n\nWhat?\n": "nope.png: no such file",
        ".\n\nWhat?\n": ".: not a file",
        "http://127.0.0.1/a.png\n\nWhat?\n": "fetched only with --allow-urls",
        "\n/what\nWhat?\n": "/what is no command; /help lists them",
        "\nLook at {3}.\n": "there is no picture {3}; 0 have been shown",
        "/history -1\n\nWhat?\n": "history -1 must be at least 0",
        "/tiles many\n\nWhat?\n": "'many' is not a number",
        "/tiles 0\n\nWhat?\n": "tiles 0 must be at least 1",
        "wide.png\n": "no question followed the last 1 pictures",
    }
    for lines, message in mistakes.items():
        done = script(lines, "--url", server.url)
        assert done.exit_code == 1, lines
        assert message in done.stderr
        assert isinstance(done.exception, SystemExit)


def test_commands_change_what_is_asked(server: Endpoint, script: Script) -> None:
    lines = "/history 0\n/tiles 5\nwide.png\n\none\n\ntwo\n/tiles off\n/reset\n\nthree\n/quit\n\nnever\n"
    done = script(lines, "--url", server.url)
    assert done.exit_code == 0, done.stderr
    one, two, three = server.asked
    assert [roles_and_kinds(each) for each in (one, two, three)] == [
        [("user", ["image", "one"])],
        [("user", ["image", "two"])],  # the answer is out of the prompt, the picture is not
        [("user", ["three"])],
    ]
    assert [each.get("smolvlm") for each in (one, two, three)] == [{"max_tiles": 5}, {"max_tiles": 5}, None]


def test_options_reach_the_endpoint(server: Endpoint, script: Script, tmp_path: Path) -> None:
    server.key = "sk-0123456789abcdef"
    key_file = tmp_path / "key"
    key_file.write_text(f"# the second line counts\n{server.key}\n")
    options = ("--max-new-tokens", "7", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--tiles", "4")
    done = script("\nHi\n", "--url", server.url, "--api-key-file", str(key_file), *options)
    assert (done.exit_code, done.stdout) == (0, "Two cats & a <b>dog</b>.\n"), done.stderr
    (request,) = server.asked
    expected = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "smolvlm": {"max_tiles": 4}}
    assert expected.items() <= request.items()


def test_mistakes_on_the_command_line_end_with_2(server: Endpoint, script: Script, pictures: Path) -> None:
    server.key = "sk-0123456789abcdef"
    (pictures / "empty").write_text("# nothing\n")
    mistakes = {
        "give its key with --api-key-file": ("--url", server.url),
        "does not answer": ("--url", "http://127.0.0.1:9"),
        "no route /elsewhere": ("--url", f"{server.url}/elsewhere"),
        "unsupported protocol": ("--url", "ftp://127.0.0.1"),
        "holds no key": ("--url", server.url, "--api-key-file", "empty"),
        "--api-key-file none: No such file": ("--url", server.url, "--api-key-file", "none"),
        "it needs --url": ("--api-key-file", "empty"),
        "leave out --model": ("--url", server.url, "--model", "x/y"),
        "model 'nowhere' cannot be loaded": ("--model", "nowhere"),
    }
    for message, arguments in mistakes.items():
        done = script("", *arguments)
        assert (done.exit_code, done.stdout) == (2, ""), (arguments, done.stderr)
        assert message in done.stderr
        assert isinstance(done.exception, SystemExit)


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


def test_the_gateway_answers_as_the_model_in_this_process_does(local: LocalModel, tiny_checkpoint: Path) -> None:
    model = Model(str(tiny_checkpoint), dtype="float32")
    worker = EngineWorker(model, EngineOptions(threads=1))
    engines, conversation = LocalEngines(worker), Conversation(history=1, max_tiles=5)
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
        assert second_cached >= first_prompt - 16  # the engine behind it keeps the conversation as well

        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        stopped = remote.answer(prompt, AnswerOptions(max_new_tokens=1500), interrupt)
        assert (stopped.finish_reason, stopped.output_tokens) == ("aborted", 1)
        deadline = time.monotonic() + 30
        while engines.num_streams:
            assert time.monotonic() < deadline, "the gateway goes on answering nobody"
            time.sleep(0.02)
        with pytest.raises(NoAnswer, match=r"refused \(400\)"):
            remote.answer(conversation.prompt("long " * 2100), SHORT, lambda _: None)
        remote.close()
    worker.close()


def test_a_conversation_too_long_is_said_with_its_remedy(local: LocalModel) -> None:
    conversation = Conversation()
    with pytest.raises(NoAnswer, match="leave no room for an answer: /tiles and /history"):
        local.answer(conversation.prompt("long " * 2100), SHORT, lambda _: None)


def test_files_are_found_as_people_write_them(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (pictures / "wide.png").read_bytes()
    monkeypatch.setenv("HOME", str(pictures))
    spelled = str(pictures / "wide.png")
    for where in (spelled, f"'{spelled}'", f'"{spelled}"', spelled.replace(" ", "\\ "), "~/wide.png"):
        assert read_file(where) == data
    (pictures / "it's.png").write_bytes(b"x")
    assert read_file(str(pictures / "it's.png")) == b"x"
    for where, message in {"none": "no such file", "/dev/zero": "not a file", str(pictures): "not a file"}.items():
        with pytest.raises(NoAnswer, match=message):
            read_file(where)
    with (pictures / "large").open("wb") as large:
        large.truncate(100_000_001)
    with pytest.raises(NoAnswer, match="larger than 100,000,000 bytes"):
        read_file(str(pictures / "large"))
    with pytest.raises(NoAnswer, match="File name too long"):
        read_file("a" * 5000)
    for where in ("~nobody-of-this-name/a.png", "a\0b"):
        with pytest.raises(NoAnswer):
            read_file(where)


def test_pictures_of_the_internet_are_fetched_if_allowed_and_inner_addresses_never(
    script: Script, server: Endpoint, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/wide.png"] = (pictures / "wide.png").read_bytes()
    lines = f"{server.url}/wide.png\n\nWhat?\n"
    refused = script(lines, "--url", server.url, "--allow-urls")
    assert refused.exit_code == 1
    assert "the image could not be fetched" in refused.stderr
    assert "/wide.png" not in [path for path, _ in server.requests]

    monkeypatch.setattr("pipeline.endpoint.fetch_url.is_public", lambda address: address.is_loopback)
    done = script(lines, "--url", server.url, "--allow-urls")
    assert (done.exit_code, done.stdout) == (0, "Two cats & a <b>dog</b>.\n"), done.stderr
    assert roles_and_kinds(server.asked[-1]) == [("user", ["image", "What?"])]


def test_completions_are_what_lies_there(pictures: Path) -> None:
    (pictures / "wild").mkdir()
    assert completions(f"{pictures}/wi") == [f"{pictures}/wide.png", f"{pictures}/wild/"]
    assert completions(f"{pictures}/wild/") == []
    assert completions(f"{pictures}/none/x") == []


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\r\x00\x7f\td\né ✓") == "a[31mbc\td\né ✓"


def test_numbers_are_left_out_where_they_are_not_known() -> None:
    stopped = Reply("x", "aborted", 1, 0.5, 0.75)
    assert stats_text(stopped) == "1 out · first after 0.50 s, all after 0.75 s"
    nothing = Reply("", "aborted", 0, None, 0.75, prompt_tokens=1234, grids=[(0, 0), (2, 3)])
    assert stats_text(nothing) == "tiles 1, 2×3+1 = 7 · 1,234 tokens in · 0 out"
    whole = Reply("x", "stop", 11, 1.0, 3.0, prompt_tokens=20, cached_tokens=16)
    assert (
        stats_text(whole)
        == "20 tokens in (16 kept from before) · 11 out · first after 1.00 s, all after 3.00 s, 5.0 tokens/s"
    )


def test_keys_are_never_repeated_in_messages(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sha256:00ff\n")
    with pytest.raises(ConfigError, match="holds no key") as refused:
        read_key(file)
    assert "00ff" not in str(refused.value)
    file.write_text("\n# remark\n  sk-one  \nsk-two\n")
    assert read_key(file) == "sk-one"


def test_the_default_model_is_that_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr("jobs.chat.LocalModel", lambda *arguments: loaded.append(arguments))
    open_model(None, None, None, None, None)
    open_model("some/other", "0" * 40, "float32", None, None)
    from jobs.shortcuts import DEFAULT_MODEL, DEFAULT_REVISION

    assert loaded == [(DEFAULT_MODEL, DEFAULT_REVISION, "bfloat16"), ("some/other", "0" * 40, "float32")]
