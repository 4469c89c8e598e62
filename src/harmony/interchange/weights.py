"""Weights from elsewhere: read from files, or fetched by timm and open_clip, and loaded completely or not at all."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harmony.errors import UserError, unknown

State = dict[str, Tensor]


def read_weights(path: Path) -> State:
    """The state dict in a file: safetensors, or a PyTorch checkpoint that holds nothing but tensors and plain values.

    One that lies under `state_dict` or `model` is taken from there; the prefix `module.` of a parallel wrapper is taken
    off.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; check where the weights are")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception:
        # PyTorch's own text is long, and recommends what would run whatever code the file holds.
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise UserError(
            f"{path} is not a {kind}, or holds more than tensors; give one saved from model.state_dict()"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no plain state dict; save one with model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_completely(module: nn.Module, state: Mapping[str, Tensor], whose: str, mend: str) -> None:
    """Load a state dict, all of it or nothing.

    Args:
        module: what gets the weights.
        state: the weights, named as in the module.
        whose: what the message calls the weights, as "the weights of X in Y".
        mend: what the message says to do.

    Raises:
        UserError: a weight is missing, left over, of another shape or not finite; names the first few.
    """
    expected = module.state_dict()
    faults = [
        # A count of batches that only training without a momentum reads; files of old releases lack it.
        ("missing", [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]),
        ("unexpected", [name for name in state if name not in expected]),
        ("of another shape", [n for n, value in expected.items() if n in state and state[n].shape != value.shape]),
        ("not finite", [name for name, value in state.items() if not value.isfinite().all()]),
    ]
    for fault, names in faults:
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{whose} cannot be used, {fault}: {shown}; {mend}")
    module.load_state_dict(dict(state), strict=False)


def known_timm(name: str, listed: Iterable[str] = ()) -> str:
    """The architecture in NAME or NAME.TAG.

    Args:
        name: what is checked.
        listed: names that a suggestion is looked for among; all architectures when empty.

    Raises:
        UserError: timm has no such architecture, or none with weights of this tag.
    """
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        raise unknown("timm model", architecture, listed or timm.list_models())
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise unknown(f"weights of timm:{architecture}", tag, tags)
    return architecture


def timm_weights(name: str, instead: str) -> State:
    """A timm model's pretrained weights; `instead` is what the message says to do when they cannot be had.

    With its classifier, since timm is strict about the weights of a whole model only.
    """
    model = fetched(lambda: timm.create_model(name, pretrained=True), f"timm:{name}", instead)
    return dict(model.state_dict())


def known_open_clip(architecture: str) -> None:
    """Raise UserError when open_clip has no such architecture."""
    if architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' own warnings: of each failed attempt to fetch, of weights that are loaded here later."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def fetched(make: Callable[[], Any], what: str, instead: str) -> Any:
    """What `make` gives; whatever keeps the weights from being had becomes one sentence."""
    try:
        with quietly():
            return make()
    except Exception as error:
        raise UserError(f"the weights of {what} cannot be had ({first_sentence(error)}); {instead}") from None


def first_sentence(error: Exception) -> str:
    """What an error says, as far as it fits into one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
