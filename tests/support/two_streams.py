"""A second stream on a CPU: one moved by hand, and one that finds the races that a GPU would show now and then.

Work is done in the order of the launches. A trace notes who touched which memory, and whether the stream that launched
it had waited for what the other one did there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAIN, SECOND = 0, 1


@dataclass
class HandStream:
    """Comes to the end of as many marks as a test says."""

    num_done: int = 0
    num_marks: int = 0
    awaited: list[int] = field(default_factory=list)  # marks that the current stream was made to wait for

    def enter(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> HandEvent:
        self.num_marks += 1
        return HandEvent(self, self.num_marks)

    def lend(self, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class HandEvent:
    stream: HandStream
    number: int

    def query(self) -> bool:
        return self.number <= self.stream.num_done

    def wait(self) -> None:
        self.stream.awaited.append(self.number)


@dataclass
class Memory:
    """One allocation: who made it, who touched which bytes last when, and whether it was lent to the other stream."""

    storage: StorageWeakRef
    owner: int
    accesses: dict[tuple[int, bool, int, int], int] = field(default_factory=dict)  # (stream, writes, from, to): time
    is_lent: bool = False


class Trace(TorchDispatchMode):
    """While it is entered: `races` names every operator that touched what the other stream may not be done with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = MAIN
        self.seen = [[0, 0], [0, 0]]  # per stream, the time of each that it comes after
        self.races: list[str] = []
        self._memory: dict[int, Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        self.seen[self.stream][self.stream] += 1
        given = {parameter.name: value for parameter, value in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        for parameter in func._schema.arguments:
            writes = parameter.alias_info is not None and parameter.alias_info.is_write
            self._touch(func, given.get(parameter.name), writes)
        self._touch(func, result, writes=True)
        return result

    def lend(self, tensor: Tensor) -> None:
        self._of(tensor).is_lent = True

    def come_after(self, stream: int, seen: list[int]) -> None:
        self.seen[stream] = [max(pair) for pair in zip(self.seen[stream], seen, strict=True)]

    def check_freed(self) -> None:
        """Memory goes back to the stream that made it, which hands it out again without regard to the other."""
        for key, memory in list(self._memory.items()):
            if memory.storage.expired():
                del self._memory[key]
                others = {stream for stream, *_ in memory.accesses} - {memory.owner}
                if others and not memory.is_lent:
                    self.races.append(f"freed by stream {memory.owner}, in use on the other")

    def _touch(self, func: Any, value: Any, writes: bool) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.numel() and tensor.layout == torch.strided:  # not packed weights
                self._access(func, tensor, writes)

    def _access(self, func: Any, tensor: Tensor, writes: bool) -> None:
        memory, start = self._of(tensor), tensor.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        stop = start + extent * tensor.itemsize
        for (stream, wrote, first, last), time in memory.accesses.items():
            overlaps = first < stop and start < last and (writes or wrote)
            if stream != self.stream and overlaps and time > self.seen[self.stream][stream]:
                self.races.append(f"{func} on stream {self.stream}")
        memory.accesses[self.stream, writes, start, stop] = self.seen[self.stream][self.stream]

    def _of(self, tensor: Tensor) -> Memory:
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is None:  # the weak reference keeps the address from being another's
            memory = self._memory[storage._cdata] = Memory(StorageWeakRef(storage), self.stream)
        return memory


@dataclass
class TracedStream:
    """Under a trace; `is_over` answers whether the oldest event that was not over is over now."""

    trace: Trace
    is_over: Callable[[], bool]

    @contextmanager
    def enter(self) -> Iterator[None]:
        self.trace.stream = SECOND
        try:
            yield
        finally:
            self.trace.stream = MAIN

    def mark(self) -> TracedEvent:
        self.trace.check_freed()
        return TracedEvent(self, list(self.trace.seen[SECOND]))

    def lend(self, tensor: Tensor) -> None:
        self.trace.lend(tensor)


@dataclass(frozen=True)
class TracedEvent:
    stream: TracedStream
    seen: list[int]

    def query(self) -> bool:
        """What the host knows to be over comes before all that it launches from then on."""
        if is_over := self.stream.is_over():
            self.wait()
        return is_over

    def wait(self) -> None:
        self.stream.trace.come_after(MAIN, self.seen)
