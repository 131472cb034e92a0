"""The chat as people use it, on a terminal, and as scripts do, through a pipe."""

import base64
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from console_script import SMOLVLM
from PIL import Image
from scripted_endpoint import Endpoint, endpoint
from typer.testing import CliRunner, Result

from jobs.chat import open_model, read_file, stats_text
from jobs.chat_models import NoAnswer, Reply
from jobs.cli import app
from jobs.shortcuts import DEFAULT_MODEL, DEFAULT_REVISION, Options

Script = Callable[..., Result]


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


class Terminal:
    """A process on a terminal of its own; what a person types and reads."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.fd, self._other = pty.openpty()
        # A session's first process gets the terminal it opens for its own: only then does Ctrl-C reach it.
        shell = ["sh", "-c", 'terminal=$1; shift; exec "$@" <>"$terminal" >&0 2>&0', "sh", os.ttyname(self._other)]
        self._process = subprocess.Popen(
            [*shell, SMOLVLM, "chat", *arguments],
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull},
            start_new_session=True,
        )
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, wanted: str, timeout_s: float = 60) -> str:
        """Everything up to and including `wanted`."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self._unread:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} never came; there is {self._unread!r}"
            self._unread += os.read(self.fd, 65536).decode()
        before, _, self._unread = self._unread.partition(wanted)
        return before + wanted

    def end(self) -> int:
        return self._process.wait(30)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self.fd)
        os.close(self._other)


@pytest.fixture
def terminal(pictures: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments, folder=pictures))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def script(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """The command with these lines on standard input, in the folder of the pictures."""
    monkeypatch.chdir(pictures)
    return lambda text, *arguments: CliRunner().invoke(app, ["chat", *arguments], input=text)


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


def test_a_conversation_on_a_terminal(terminal: Callable[..., Terminal], server: Endpoint) -> None:
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
    server.gate.set()
    answer = chat.read_until("img> ")
    assert " cats & a <b>dog</b>." in answer
    assert "tiles 3×4+1 = 13 · 877 tokens in (832 kept from before) · 3 out · first after" in answer
    chat.type("\x04")
    assert chat.end() == 0
    (request,) = server.asked
    assert roles_and_kinds(request) == [("user", ["image", "image", "Which is larger?"])]


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal: Callable[..., Terminal], server: Endpoint) -> None:
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


def test_tab_completes_paths_also_with_spaces(
    terminal: Callable[..., Terminal], server: Endpoint, pictures: Path
) -> None:
    chat = terminal("--url", server.url)
    chat.read_until("img> ")
    chat.type(f"{pictures.parent}/my\t")
    chat.read_until("my pictures/")
    chat.type("wi\t\n")
    chat.read_until("picture 1: 200 × 150")


def test_a_model_in_this_process_keeps_the_conversation(
    terminal: Callable[..., Terminal], tiny_checkpoint: Path
) -> None:
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
    command = [str(SMOLVLM), "chat", "--url", server.url]
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


def test_the_default_model_is_that_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[Any, ...]] = []
    monkeypatch.setattr("jobs.chat.LocalModel", lambda *arguments: loaded.append(arguments))
    open_model(Options(), None, None)
    named = Options(model="some/other", revision="0" * 40, dtype="float32", quantization="int8")
    open_model(named, None, None)
    assert loaded == [(DEFAULT_MODEL, DEFAULT_REVISION, "auto", None), ("some/other", "0" * 40, "float32", "int8")]
