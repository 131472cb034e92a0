"""So much of something for all requests together: places, bytes of bodies, tiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.endpoint.errors import overloaded

Take = Callable[[int], None]
"""Takes a count for a request. Raises ApiError (429) if so much is not left."""


class Budget:
    """What requests under way may hold together; what one has taken is given back when it ends."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    @contextmanager
    def share(self) -> Iterator[Take]:
        """Open a request's account."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._left:
                raise overloaded()
            self._left -= count
            taken += count

        try:
            yield take
        finally:
            self._left += taken
