"""Layer-wise learning-rate decay: the nearer a layer is to the pixels, the less it learns (BEiT, arXiv 2106.08254).

A ViT of depth L gives block i of 1 .. L the factor decay^(L + 1 - i), patches, tokens and positions decay^(L + 1), and
what follows the blocks, the last norm and the head, 1.
"""

from collections.abc import Iterable
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from harmony.evaluation.fitting import Group

_WITH_THE_LAYER_BEFORE = 99999
"""Behind a pattern of a timm model's `group_matcher`: what it matches belongs to the layer before it."""

_HEAD = "(head)"


def layer_groups(model: nn.Module, decay: float) -> list[Group]:
    """The trained parameters of a timm model, by layer; norms, biases, tokens and positions do not decay.

    Args:
        model: a timm model, with a head or without; the layers are those of its `group_matcher`.
        decay: factor from each layer to the one before it.
    """
    # What no pattern matches follows the blocks; the name of a head is among them, so that a model without one has this
    # layer, too, and its last block the same rate whether the head is a part of it or stands on it.
    matcher = _last_norm_apart(model)
    names = [*model.named_parameters(), *([(_HEAD, None)] if isinstance(matcher, dict) else [])]
    layers = group_with_matcher(iter(names), matcher, reverse=True)
    last = max(layers.values())
    kept = _undecayed(model)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in kept
            members.setdefault((layers.get(name, last), decays), []).append(parameter)
    ordered = sorted(members.items(), key=lambda item: item[0])
    return [Group(group, decay ** (last - layer), decays) for (layer, decays), group in ordered]


def head_groups(parameters: Iterable[nn.Parameter]) -> list[Group]:
    """A head's parameters at the full learning rate, weight decay on matrices alone."""
    every = list(parameters)
    return [
        Group([one for one in every if one.ndim > 1]),
        Group([one for one in every if one.ndim <= 1], decays=False),
    ]


def _undecayed(model: Any) -> set[str]:
    """Names that a timm model wants no weight decay on: tokens and positions; norms and biases are known by shape."""
    return set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def _last_norm_apart(model: Any) -> Any:
    """The model's matcher, but with the norm behind the blocks counted to the head.

    timm puts it with the last block, BEiT and MAE give it the full learning rate.
    """
    matcher = model.group_matcher(coarse=False)
    if not isinstance(matcher, dict):
        return matcher
    last = list(matcher)[-1]
    if not isinstance(matcher[last], list | tuple):
        return matcher
    own = [spec for spec in matcher[last] if spec[1] is None or spec[1][-1] != _WITH_THE_LAYER_BEFORE]
    return matcher | {last: own}
