"""timm's models as encoders.

timm:NAME                   with its pretrained weights
timm:NAME?weights=FILE      with the weights in a file, named as timm's own
"""

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder, Encoding, hash_of
from harmony.evaluation.progress import say
from harmony.evaluation.seeds import seeded
from harmony.evaluation.trunk import Trunk, patch_of
from harmony.interchange.weights import State, known_timm, load_completely, read_weights, timm_weights


class TimmEncoder(Encoder):
    """A timm model; its embedding is what timm's own classifier would see.

    Attributes:
        trunk: the model.
    """

    def __init__(self, name: str, trunk: Trunk, size: int, device: torch.device) -> None:
        self.name = name
        self.trunk = trunk
        self.device = device
        self.size, self.patch, self.width, self.depth = size, trunk.patch, trunk.width, trunk.depth
        how = resolve_model_data_config(trunk.model)
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])
        self.embed = self.images(torch.zeros(1, 3, size, size, device=device)).shape[-1]
        self.reads_text = False

    def fingerprint(self) -> str:
        # The number of heads, the activation and the like change what is computed, but no weight's name or shape.
        how = (self.trunk.name, self.size, repr(self.trunk.model), self.mean, self.std)
        return hash_of(self.trunk.model.state_dict().items(), str(how))

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        return self.trunk.encode(pixels, layers, lambda model, final: model.forward_head(final, pre_logits=True))

    def texts(self, texts: Sequence[str]) -> Tensor:
        raise UserError(f"{self.name} has no text tower; use a model that was trained on captions")

    def backbone(self, size: int, drop_path: float = 0.0) -> nn.Module:
        return self.trunk.backbone(size, drop_path)


def load_timm(name: str, weights: Path | None, untrained: bool, device: torch.device) -> TimmEncoder:
    """A timm model.

    Args:
        name: timm's name, with or without a tag.
        weights: a file of its weights; None stands for timm's own.
        untrained: take weights drawn from a fixed seed instead.
        device: where it computes.

    Raises:
        UserError: there is no such model, or its weights cannot be had or do not fit.
    """
    architecture = known_timm(name)
    where = f"timm:{name}" if weights is None else f"timm:{name}?weights={weights}"
    state = None
    with seeded("untrained", architecture):
        if weights is not None and not untrained:
            state = read_weights(weights)
        elif not untrained:
            _check_has_weights(name, architecture)
            say(f"loading the weights of {where}, which may have to be fetched")
            state = timm_weights(name, f"give them as timm:{name}?weights=FILE")
        model = _build(name, 0.0)
    size = _size(model)
    if state is not None:
        state = _named_as(model, architecture, state)
        size = _size_of_positions(model, state) or size
        _set_size(model, size)
        mend = "give weights of the same timm model, as model.state_dict() has them"
        load_completely(model, state, f"the weights of {where}", mend)

    def build(drop_path: float) -> nn.Module:
        return _set_size(_build(name, drop_path), size)

    trunk = Trunk(f"timm:{name}", model, build, (size, size), device)
    return TimmEncoder(f"{where} (untrained)" if untrained else where, trunk, size, device)


def _build(name: str, drop_path: float) -> Any:
    try:
        return timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
    except TypeError:
        if drop_path:
            raise
        return timm.create_model(name, num_classes=0)


def _size(model: Any) -> int:
    side: int = resolve_model_data_config(model)["input_size"][-1]
    return side


def _set_size(model: Any, size: int) -> Any:
    if size != _size(model):
        model.set_input_size(img_size=(size, size))
    return model


def _check_has_weights(name: str, architecture: str) -> None:
    if timm.is_model_pretrained(name):
        return
    tags = timm.list_pretrained(f"{architecture}.*")
    other = f"name one of {', '.join(tags[:5])}, or give" if tags else "give"
    raise UserError(
        f"timm has no pretrained weights for {name}; {other} them as timm:{name}?weights=FILE, "
        "or measure it as first drawn by --model untrained"
    )


def _named_as(model: Any, architecture: str, state: State) -> State:
    """The state dict as timm names it, without its classifier.

    Files of some original publications have other names, which timm's module for the architecture translates.
    """
    own = _without_classifier(model, state)
    if own.keys() == model.state_dict().keys():
        return own
    module: Any = import_module(timm.models.model_entrypoint(architecture).__module__)
    try:
        translated = _without_classifier(model, dict(module.checkpoint_filter_fn(dict(state), model)))
    except Exception:
        return own  # of whose names the first that is wrong is told
    # A patch embedding of another size would be resized without a word.
    sides = {value.shape[2:] for key, value in state.items() if key.endswith("patch_embed.proj.weight")}
    fits = translated.keys() == model.state_dict().keys() and sides <= {(patch_of(model),) * 2, ()}
    return translated if fits else own


def _without_classifier(model: Any, state: State) -> State:
    named = model.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    own = model.state_dict()
    return {key: value for key, value in state.items() if key in own or not key.startswith(classifiers)}


def _size_of_positions(model: Any, state: State) -> int | None:
    """Side in px of the inputs that a file's learned positions are for, where those are another square grid."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is None or own is None or table.ndim != 3 or table.shape[1] == own.shape[1]:
        return None
    if not hasattr(model, "set_input_size"):
        return None
    count = table.shape[1] - (own.shape[1] - model.patch_embed.num_patches)
    side = math.isqrt(max(count, 0))
    return side * patch_of(model) if side * side == count and side else None
