"""open_clip's models as encoders, with both towers.

open_clip:ARCH/TAG              with weights that open_clip knows by a tag
open_clip:ARCH?weights=FILE     with the weights in a file, named as open_clip's own
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from harmony.errors import UserError, unknown
from harmony.evaluation.encoder import Encoder, Encoding, Layer, hash_of
from harmony.evaluation.progress import say
from harmony.evaluation.seeds import seeded
from harmony.evaluation.trunk import Trunk
from harmony.interchange.open_clip_vit import as_timm
from harmony.interchange.weights import (
    State,
    fetched,
    first_sentence,
    known_open_clip,
    load_completely,
    quietly,
    read_weights,
)


class OpenClipEncoder(Encoder):
    """Both towers of an open_clip model.

    Attributes:
        model: the open_clip model; without its image tower where `trunk` stands for it.
        trunk: the image tower's timm model; None for a tower that is used as open_clip made it.
    """

    def __init__(self, name: str, architecture: str, model: Any, device: torch.device) -> None:
        self.name = name
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        how = open_clip.get_model_preprocess_cfg(model)
        size = _pair(how["size"])
        self.size = size[0]
        self.mean, self.std = tuple(how["mean"]), tuple(how["std"])
        # The activation is not the architecture's alone: weights of some tags want another one (quick_gelu).
        self._identity = hash_of(model.state_dict().items(), str((architecture, repr(model), self.mean, self.std)))
        self.reads_text = True
        self._tokenizer = _tokenizer(architecture)
        self.trunk, self._project = _trunk(name, architecture, model.visual, size, device)
        if self.trunk is not None:
            self.patch, self.width, self.depth = self.trunk.patch, self.trunk.width, self.trunk.depth
            model.visual = nn.Identity()  # its weights are the trunk's now
            self.embed = self.images(torch.zeros(1, 3, *size, device=device)).shape[-1]
            return
        outputs = self.model.visual.forward_intermediates(torch.zeros(1, 3, *size, device=device))
        stages = [tuple(stage.shape[1:]) for stage in outputs["image_intermediates"]]
        self.embed = outputs["image_features"].shape[-1]
        self.width, self.patch = stages[-1][0], size[0] // stages[-1][1]
        self.depth = sum(stage == stages[-1] for stage in stages)

    def fingerprint(self) -> str:
        return self._identity

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        if self.trunk is not None:
            return self.trunk.encode(pixels, layers, self._project)
        if pixels.shape[-2:] != (self.size, self.size):
            raise UserError(
                f"{self.name} takes images of {self.size} x {self.size} px alone, not of {pixels.shape[-1]} x "
                f"{pixels.shape[-2]} px; leave size out"
            )
        outputs = self.model.visual.forward_intermediates(pixels, indices=max(layers, 1), output_extra_tokens=True)
        maps = outputs["image_intermediates"][-layers:] if layers else []
        prefixes = outputs.get("image_intermediates_prefix", [None] * len(maps))[-len(maps) :]
        return Encoding(
            outputs["image_features"],
            [
                Layer(patches.mean(dim=(2, 3)) if prefix is None else prefix[:, 0], patches)
                for patches, prefix in zip(maps, prefixes if maps else [], strict=True)
            ],
        )

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        if isinstance(self._tokenizer, str):
            raise UserError(f"{self.name} cannot read texts: its tokenizer cannot be had ({self._tokenizer})")
        embeddings: Tensor = self.model.encode_text(self._tokenizer(list(texts)).to(self.device), normalize=False)
        return embeddings

    def backbone(self, size: int, drop_path: float = 0.0) -> nn.Module:
        if self.trunk is None:
            raise UserError(
                f"{self.name} has an image tower that cannot be trained further here, since it is no timm model; "
                "choose a task that keeps the encoder frozen, or another model"
            )
        return self.trunk.backbone(size, drop_path)


def load_open_clip(name: str, weights: Path | None, untrained: bool, device: torch.device) -> OpenClipEncoder:
    """An open_clip model.

    Args:
        name: ARCH/TAG, or ARCH alone with a file of weights or untrained.
        weights: a file of its weights, instead of a tag.
        untrained: take weights drawn from a fixed seed instead.
        device: where it computes.

    Raises:
        UserError: there is no such model, or its weights cannot be had or do not fit.
    """
    architecture, _, tag = name.partition("/")
    known_open_clip(architecture)
    where = f"open_clip:{name}" if weights is None else f"open_clip:{name}?weights={weights}"
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and weights is not None:
        raise UserError(f"{where} names weights twice; leave out /{tag} or ?weights=")
    if tag and tag not in tags:
        raise unknown(f"weights of open_clip:{architecture}", tag, tags)
    if not tag and weights is None and not untrained:
        named = f"open_clip:{architecture}/TAG with TAG one of {', '.join(tags)}, or " if tags else ""
        raise UserError(f"{where} names no weights; write {named}open_clip:{architecture}?weights=FILE")
    with seeded("untrained", architecture):
        if tag and not untrained:
            say(f"loading the weights of {where}, which may have to be fetched")
            instead = f"give them as open_clip:{architecture}?weights=FILE"
            model = fetched(partial(_create, architecture, tag), where, instead)
        else:
            state = read_weights(weights) if weights is not None and not untrained else None
            model = _without_weights(architecture, where)
            if state is not None:
                mend = "give weights of the same open_clip model, as model.state_dict() has them"
                load_completely(model, _named_as(model, state), f"the weights of {where}", mend)
        return OpenClipEncoder(f"{where} (untrained)" if untrained else where, architecture, model, device)


def _create(architecture: str, tag: str | None) -> Any:
    """The model with the weights of a tag, or with none, but with the preprocessing of its weights all the same."""
    how = _preprocessing(architecture, tag)
    return open_clip.create_model(
        architecture,
        pretrained=tag,
        pretrained_text=False,
        force_quick_gelu=bool(how.get("quick_gelu")),
        force_preprocess_cfg={key: how[key] for key in ("mean", "std") if key in how},
    )


def _without_weights(architecture: str, where: str) -> Any:
    try:
        with quietly():
            return _create(architecture, None)
    except Exception as error:
        raise UserError(f"{where} cannot be built ({first_sentence(error)}); choose another model") from None


def _preprocessing(architecture: str, tag: str | None) -> dict[str, Any]:
    """What open_clip knows of a tag's weights; without one, what it knows of all weights of the architecture alike."""
    if tag is not None:
        return dict(open_clip.get_pretrained_cfg(architecture, tag))
    known = [
        open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)
    ]
    agreed = {key for key in ("mean", "std") if known and all(one.get(key) == known[0].get(key) for one in known)}
    return {key: known[0][key] for key in agreed if key in known[0]}


def _named_as(model: Any, state: State) -> State:
    """The state dict as this release of open_clip names it; earlier forms of its own files are understood."""
    state = dict(convert_state_dict(model, dict(state)))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        own = getattr(model, key, None)
        if key in state and own is not None:
            state[key] = state[key].reshape(own.shape)
    return state


def _trunk(
    name: str, architecture: str, visual: Any, size: tuple[int, int], device: torch.device
) -> tuple[Trunk | None, Callable[[Any, Tensor], Tensor]]:
    """The image tower's timm model, and what makes an embedding of its features."""
    if isinstance(visual, TimmModel):
        build = partial(_build_timm, open_clip.get_model_config(architecture)["vision_cfg"])
        head = visual.head
        return Trunk(name, visual.trunk, build, size, device), lambda model, final: head(model.forward_head(final))
    plain = as_timm(visual)
    if plain is None:
        return None, lambda model, final: final
    projection = visual.proj
    return Trunk(name, *plain, size, device), lambda model, final: model.forward_head(final) @ projection


def _build_timm(vision: dict[str, Any], drop_path: float) -> nn.Module:
    """A timm tower's model as open_clip makes it, but for a classifier that serves as the projection."""
    pool = vision.get("timm_pool", "avg")
    model: Any = timm.create_model(vision["timm_model_name"], num_classes=0, drop_path_rate=drop_path)
    if pool and pool not in ("abs_attn", "rot_attn"):
        model.reset_classifier(0, global_pool=pool)
    return model


def _tokenizer(architecture: str) -> Any:
    """The model's tokenizer, or why it cannot be had: images can be measured all the same."""
    try:
        return open_clip.get_tokenizer(architecture)
    except Exception as error:
        return first_sentence(error)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
