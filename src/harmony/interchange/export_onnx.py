"""The image tower as a folder for any ONNX runtime: `model.onnx` and how images are prepared for it.

Input: `pixels` (B, 3, S, S) float32, normalised. Outputs: `cls` (B, D), `patches` (B, N, D), and where the model reads
captions `embedding` (B, E), the image in the space shared with them. B is free, S is what the positions are for.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.interchange.export import Exported, Written

_ONE_FILE = 1 << 30
"""Bytes of weights up to which they lie within model.onnx; the format ends at 2 GiB."""


class Encoder(nn.Module):
    """The tower as a function from pixels to a fixed set of outputs, by timm's own forward pass."""

    def __init__(self, what: Exported) -> None:
        super().__init__()
        self.trunk, self.prefix = what.towers.image.trunk, what.towers.image.prefix
        self.proj = what.towers.image.proj if what.towers.text is not None else None

    @property
    def outputs(self) -> list[str]:
        return ["cls", "patches"] + (["embedding"] if self.proj is not None else [])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens = self.trunk.forward_features(pixels)
        cls, patches = tokens[:, 0], tokens[:, self.prefix :]
        return (cls, patches) if self.proj is None else (cls, patches, self.proj(cls))


def written(what: Exported) -> Written:
    """The graph, and size, mean and standard deviation of its input.

    Raises:
        UserError: a package is missing.
    """
    lacking = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if lacking:
        raise UserError(
            f"--to onnx needs the package {' and '.join(lacking)}; install it by `pip install harmony[onnx]`"
        )
    image = what.model.image
    preparation = {
        "input": "pixels",
        "size": what.size,
        "resize": "shorter side to size, bicubic with antialiasing, then the central square",
        "scale": 1 / 255,
        "mean": list(image.mean),
        "std": list(image.std),
    }
    return {"preprocessing.json": preparation, "model.onnx": partial(_write, Encoder(what).eval(), what.size)}


def _write(encoder: Encoder, size: int, path: Path) -> None:
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    with _silence():
        torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, size, size),),
            path,
            input_names=["pixels"],
            output_names=encoder.outputs,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
            external_data=weights > _ONE_FILE,
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's running commentary."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
