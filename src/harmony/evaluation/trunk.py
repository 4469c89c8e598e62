"""A timm model as the image tower of an encoder: any input size, the last blocks' features, a copy to train on.

Shapes: B images, D width, H x W px, h x w patches.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.evaluation.encoder import Encoding, Layer
from harmony.interchange.weights import first_sentence

Build = Callable[[float], nn.Module]
"""Makes the same architecture anew, without a classifier, given the stochastic depth rate of the last block."""


class Trunk:
    """A timm model, frozen.

    Attributes:
        name: what messages call it.
        model: the timm model, in evaluation mode, made for one input size.
        width: D of the last block.
        patch: px between two places of its map.
        depth: number of last blocks (stages of a hierarchical model) that share the last one's width and map.
    """

    def __init__(self, name: str, model: Any, build: Build, size: tuple[int, int], device: torch.device) -> None:
        """Wrap a model.

        Args:
            name: see above.
            model: the timm model, with its weights.
            build: see `Build`.
            size: height and width in px that the model is made for.
            device: where it computes.

        Raises:
            UserError: the model does not offer what is needed of it.
        """
        missing = [
            part for part in ("forward_intermediates", "forward_head", "feature_info") if not hasattr(model, part)
        ]
        if missing:
            raise UserError(f"{name} cannot be evaluated: timm's {type(model).__name__} has no {missing[0]}")
        self.name = name
        self.model = model.to(device).eval().requires_grad_(False)
        self._build = build
        self._size = size
        stages = [(info["num_chs"], info["reduction"]) for info in _stages(self.model)]
        self.width, self.patch = stages[-1]
        differing = [place for place, stage in enumerate(stages) if stage != stages[-1]]
        self.depth = len(stages) - (differing[-1] + 1 if differing else 0)
        self._stages = len(stages)
        # Asked for prefix tokens, some of timm's models without any fail.
        parameters = inspect.signature(self.model.forward_intermediates).parameters
        has_cls = getattr(self.model, "cls_token", None) is not None
        self._has_class_token = has_cls and "return_prefix_tokens" in parameters
        self._options = {"return_prefix_tokens": True} if self._has_class_token else {}
        self._options["norm"] = self._norms_intermediates(device)
        self._sized: tuple[tuple[int, int], Any] = (size, self.model)

    @torch.no_grad()
    def _norms_intermediates(self, device: torch.device) -> bool:
        """Whether the model can apply its final norm to what its blocks give; a few of timm's refuse to."""
        try:
            last = [self._stages - 1]
            self.model.forward_intermediates(torch.zeros(1, 3, *self._size, device=device), indices=last, norm=True)
        except AssertionError:
            return False
        return True

    def encode(self, pixels: Tensor, layers: int, embed: Callable[[Any, Tensor], Tensor]) -> Encoding:
        """Images through the model, once.

        Args:
            pixels: (B, 3, H, W) normalised.
            layers: how many of the last blocks are wanted too, at most `depth`.
            embed: given a timm model and what its `forward_features` gives, the embedding.

        Raises:
            UserError: the model cannot take images of this size.
        """
        model = self._at((pixels.shape[-2], pixels.shape[-1]))
        if not layers:
            final = model.forward_features(pixels)
            return Encoding(embed(model, final))
        wanted = list(range(self._stages - layers, self._stages))
        final, taken = model.forward_intermediates(pixels, indices=wanted, **self._options)
        found = [self._layer(model, entry) for entry in taken]
        if not self._has_class_token:
            # What the model itself makes of the whole image is there for its last block alone.
            pooled = model.forward_head(final, pre_logits=True)
            if pooled.shape == found[-1].cls.shape:
                found[-1] = Layer(pooled, found[-1].patches)
        return Encoding(embed(model, final), found)

    def _layer(self, model: Any, entry: Tensor | tuple[Tensor, Tensor]) -> Layer:
        patches, prefix = entry if isinstance(entry, tuple | list) else (entry, None)
        norm = _late_norm(model)
        if isinstance(norm, LayerNorm2d):
            patches = norm(patches)
        elif norm is not None:
            patches = norm(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if not self._has_class_token or prefix is None:
            return Layer(patches.mean(dim=(2, 3)), patches)
        return Layer(prefix[:, 0] if norm is None else norm(prefix[:, 0]), patches)

    def _at(self, size: tuple[int, int]) -> Any:
        """The model for inputs of (H, W): itself, or a copy that shares all weights but those that depend on size."""
        if size == self._size:
            return self.model
        if self._sized[0] != size:
            shared = {id(parameter): parameter for parameter in self.model.parameters()}
            self._sized = (size, self._resized(copy.deepcopy(self.model, shared), size))
        return self._sized[1]

    def _resized(self, model: Any, size: tuple[int, int]) -> Any:
        cannot = f"{self.name} cannot take images of {size[1]} x {size[0]} px"
        if not hasattr(model, "set_input_size"):
            if model.pretrained_cfg.get("fixed_input_size"):
                raise UserError(f"{cannot}; set size to its own, {self._size[0]}")
            return model
        patch = patch_of(model)
        for side in size:
            if side % patch:
                below = side // patch * patch
                advice = f"set size to {below or patch}" + (f" or {below + patch}" if below else "")
                raise UserError(f"{cannot}: {side} is not a multiple of the patch size {patch}; {advice}")
        try:
            model.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{cannot} ({first_sentence(error)}); set size to its own, {self._size[0]}") from None
        return model

    def backbone(self, size: int, drop_path: float) -> nn.Module:
        """A trainable copy, see `Encoder.backbone`."""
        try:
            model = self._build(drop_path)
        except TypeError:
            if drop_path:
                raise UserError(f"{self.name} has no stochastic depth; set drop_path to 0") from None
            raise
        own = model.state_dict().keys()
        model.load_state_dict({key: value for key, value in self.model.state_dict().items() if key in own})
        if (size, size) != self._size:
            model = self._resized(model, (size, size))
        return model.requires_grad_(True).train().to(next(self.model.parameters()).device)


def patch_of(model: Any) -> int:
    """Side in px of what the model's first layer embeds as one; 1 for a model that cuts no patches."""
    sides = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(sides[0] if isinstance(sides, tuple | list) else sides)


def _stages(model: Any) -> list[dict[str, Any]]:
    """What timm says of the stages, which it keeps as a list or as an object of its own."""
    info = model.feature_info
    return list(info.get_dicts()) if hasattr(info, "get_dicts") else list(info)


def _late_norm(model: Any) -> nn.Module | None:
    """The final norm of a model that applies it after pooling only, and so not to the tokens it hands out."""
    if not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
        return None
    for norm in (getattr(model, "fc_norm", None), getattr(getattr(model, "head", None), "norm", None)):
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return None
