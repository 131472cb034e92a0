"""What this process tries to reach: connections, name look-ups and opened files, told by Python's own audit hooks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reached:
    """Addresses connected to, names looked up, files opened."""

    connected: list[tuple[str, int]] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            self.connected.append((str(arguments[1][0]), int(arguments[1][1])))
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            self.looked_up.append(str(arguments[0]))
        elif event == "open":
            self.opened.append(str(arguments[0]))


_listeners: list[Reached] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener.note(event, arguments)


@contextmanager
def watching() -> Iterator[Reached]:
    """Record until the block ends. An audit hook cannot be taken away, so there is one, and it does nothing outside."""
    if not _listeners:
        sys.addaudithook(_hook)
    reached = Reached()
    _listeners.append(reached)
    try:
        yield reached
    finally:
        _listeners.remove(reached)
