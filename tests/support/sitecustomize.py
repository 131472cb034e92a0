"""Python imports this at start-up of every process that finds it: decoder processes die of images that say `poison:`.

Only Pillow is touched, and only in decoder processes: the product has no hook for its tests.
"""

import ctypes
import os
import re
import sys
from typing import Any

_POISON = re.compile(rb"poison:(segfault|hang|memory|exit|abort)")


def _suffer(kind: str) -> None:
    if kind == "segfault":
        ctypes.string_at(0)
    elif kind == "hang":
        re.match("(a+)+$", "a" * 64 + "b")  # never returns and holds the interpreter lock
    elif kind == "memory":
        import numpy as np

        hoard = []
        while True:
            hoard.append(np.empty(64 << 20, np.uint8))  # the limit counts what is asked for; filling it takes seconds
    elif kind == "exit":
        os._exit(0)
    else:
        os.abort()


def _poison_pillow() -> None:
    import PIL.Image

    original = PIL.Image.open

    def poisoned(fp: Any, *args: Any, **kwargs: Any) -> Any:
        found = _POISON.search(fp.getvalue())
        if found:
            _suffer(found.group(1).decode())
        return original(fp, *args, **kwargs)

    PIL.Image.open = poisoned


if "pipeline.decode_process" in sys.orig_argv:
    _poison_pillow()
