"""Where a step makes the host wait for the device.

On a GPU torch itself reports them. On a CPU nothing waits, but the same operations run, so those that would have to
wait on a GPU are counted; copies between host and device are not seen there.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount", "histc")
"""Operations whose result, or the size of it, the host must know."""

_OWN = ("/benchmarks/meetings.py", "/torch/", "/warnings.py")
"""Files that are passed over when looking for who asked."""

_HOST_ALONE = ("harmony/chance.py",)
"""Files that make arrays of tensors only where these lie on the host; on a GPU they compute there."""


@contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """Count what waits within the block, by the line of code that asks for it."""
    found: Counter[str] = Counter()
    if device.type == "cuda":
        with _reported(found):
            yield found
        return
    with _Reads(found), _Waits(found):
        yield found


@contextmanager
def _reported(found: Counter[str]) -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_asked_by()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # catch_warnings brings the old one back
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class _Reads(TorchFunctionMode):
    """Notes tensors that are made into lists, which on a CPU calls no operation."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        if func in (Tensor.tolist, Tensor.numpy):
            place = _asked_by()
            if not place.rpartition(":")[0].endswith(_HOST_ALONE):
                self._found[place] += 1
        return func(*args, **(kwargs or {}))


class _Waits(TorchDispatchMode):
    """Notes operations that would wait on a GPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if _waits(func, args, kwargs or {}):
            self._found[_asked_by()] += 1
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in args[1])
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    return name in _WAITING


def _asked_by() -> str:
    """The innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if not any(own in frame.filename for own in _OWN):
            return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"
    return "?"
