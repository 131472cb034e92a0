"""Lines in, text out: with prompts, line editing and colours where a person sits, plain where a script does."""

import sys
import unicodedata
from pathlib import Path

from rich.console import Console


class Terminal:
    """Lines in, text out."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=not self.is_interactive, highlight=False, markup=False, emoji=False)
        self._is_mid_line = False
        if self.is_interactive:
            _complete_paths()

    def ask(self, prompt: str) -> str:
        """Read a line, without the white space around it. Raises EOFError at the end."""
        self.end_line()
        if self.is_interactive:
            return input(prompt).strip()
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def show(self, text: str) -> None:
        """Write a piece of an answer."""
        print(printable(text), end="", flush=True)
        self._is_mid_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line where the last one has something on it."""
        if self._is_mid_line:
            self.show("\n")

    def tell(self, text: str, style: str = "dim") -> None:
        """Write a line that is not part of an answer."""
        self.end_line()
        self._notes.print(printable(text), style=style, soft_wrap=True)


def printable(text: str) -> str:
    """The text without control characters: neither a model nor a file's name may steer the terminal."""
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) != "Cc")


def _complete_paths() -> None:
    """Tab completes paths; arrows and history come with readline. Where there is none, lines are plain."""
    try:
        import readline
    except ImportError:
        return
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            found[:] = completions(text)
        return found[state] if state < len(found) else None

    readline.set_completer_delims("\n")
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in str(readline.__doc__) else "tab: complete")


def completions(text: str) -> list[str]:
    """Paths that begin like this; folders end with a slash."""
    path = Path(text).expanduser()
    folder, start = (path, "") if text.endswith("/") else (path.parent, path.name)
    try:
        entries = [each for each in folder.iterdir() if each.name.startswith(start)]
        return sorted(f"{each}/" if each.is_dir() else str(each) for each in entries)
    except OSError:
        return []
