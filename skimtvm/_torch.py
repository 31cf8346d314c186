"""TVM without PyTorch. tvm-ffi imports PyTorch where it is installed, which takes longer than the import of TVM, and 200 MB.
The processes of this package give TVM no tensors of PyTorch; what those of users do is theirs to choose."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_own = False


def own_process() -> None:
    """This process is one of the package's own: TVM needs no PyTorch here."""
    global _own  # noqa: PLW0603
    _own = True


@contextmanager
def as_needed() -> Iterator[None]:
    """In a process of the package's own ``import torch`` fails for the duration of the block, unless it is done already."""
    hidden = _own and sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]
