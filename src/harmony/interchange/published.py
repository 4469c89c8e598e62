"""Checkpoints of the published Harmony code, by the names it gave its weights.

That code registers one module under several names; each weight is read under one of them:

    image_encoder.*                                        the student's image tower
    discriminative_path.teacher.{backbone,head}.*          the teacher's image tower and prototype head
    contrastive_path.text_backbone[_teacher].*             both text towers
    discriminative_path.student_head.*, generative_path.*, mlm_head.*, text_{student,teacher}.distillation_head.*
"""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.models.text import VOCABULARY
from harmony.models.towers import Towers

State = dict[str, Tensor]


def read_published(path: Path) -> State:
    """The weights in a published checkpoint file, under their published names.

    Such a file is a pickle that holds the weights under `student`, `model` or `state_dict`, beside an
    argparse.Namespace, the one class besides tensors that is let through. The prefix `module.` of a parallel wrapper is
    taken off.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"there is no published checkpoint at {path}; check the path behind published:")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # PyTorch's own text is long, and recommends what would run whatever code the file holds.
        raise UserError(
            f"{path} is not a PyTorch checkpoint, or holds more than tensors; give a file that the published Harmony "
            "code wrote"
        ) from None
    if isinstance(content, Mapping):
        for key in ("student", "model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or "image_encoder.cls_token" not in {_bare(key) for key in content}:
        raise UserError(f"{path} holds no weights of the published Harmony code (no image_encoder.cls_token in it)")
    return {_bare(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _bare(key: str) -> str:
    return key.removeprefix("module.")


def towers_from_published(state: Mapping[str, Tensor], model: str = "student") -> State:
    """Weights of both towers, named as in `Towers.state_dict()`.

    Args:
        state: weights under their published names.
        model: "student" or "teacher". The teacher's image tower has no mask token of its own; it gets the student's.
    """
    image = "image_encoder." if model == "student" else "discriminative_path.teacher.backbone."
    text = "contrastive_path.text_backbone" + ("." if model == "student" else "_teacher.")
    named: State = {}
    for key, value in _under(state, image).items():
        if key == "contrastive_projection":
            named["image.proj.weight"] = value.T.contiguous()
        elif key != "masked_embed":
            named[f"image.trunk.{key}"] = value
    named["image.mask_token"] = state["image_encoder.masked_embed"].reshape(-1)
    for key, value in _under(state, text).items():
        if key == "text_embedding.weight":
            # The last row of the published table is the mask token.
            named["text.transformer.token_embedding.weight"] = value[:VOCABULARY]
            named["text.mask_token"] = value[VOCABULARY]
        else:
            named["text.transformer." + _TEXT.sub(lambda match: _TEXT_NAMES[match[0]], key, count=1)] = value
    return named


def sizes_from_published(towers: Mapping[str, Tensor]) -> list[str]:
    """The sizes of both towers, as overrides of a recipe; heads are 64 wide, as in every ViT and CLIP it was used with.

    Args:
        towers: weights as `towers_from_published` names them.
    """
    patches, positions = towers["image.trunk.patch_embed.proj.weight"], towers["image.trunk.pos_embed"]
    width, patch = patches.shape[0], patches.shape[-1]
    size = math.isqrt(positions.shape[1] - 1) * patch
    words, context = towers["text.transformer.token_embedding.weight"], towers["text.transformer.positional_embedding"]
    image = {"patch": patch, "width": width, "depth": _count(towers, "image.trunk.blocks."), "heads": _heads(width)}
    text = {
        "width": words.shape[1],
        "layers": _count(towers, "text.transformer.transformer.resblocks."),
        "heads": _heads(words.shape[1]),
        "context": context.shape[0],
    }
    sizes = {f"model.image.{key}": value for key, value in image.items()}
    sizes |= {f"model.text.{key}": value for key, value in text.items()}
    sizes |= {"model.image.size": size, "model.embed": towers["image.proj.weight"].shape[0], "views.global.size": size}
    return [f"{key}={value}" for key, value in sizes.items()]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})


def _heads(width: int) -> int:
    return max(1, width // 64)


_TEXT_NAMES = {
    "text_positional_embedding": "positional_embedding",
    "backbone.": "transformer.",
    "text_norm": "ln_final",
}
_TEXT = re.compile("|".join(f"^{re.escape(name)}" for name in _TEXT_NAMES))


def objectives_from_published(state: Mapping[str, Tensor]) -> State:
    """Heads, decoders and centres, named as in the state dict of a learner with the recipe `harmony-published`."""
    named: State = {"clip.logit_scale": state["contrastive_path.logit_scale"]}
    named |= _head("dino.head", _under(state, "discriminative_path.student_head."))
    named |= _head("dino.teacher_head", _under(state, "discriminative_path.teacher.head."))
    named["dino.centre.mean"] = state["discriminative_path.loss.center"].reshape(-1)
    named["ibot.centre.mean"] = state["discriminative_path.loss.center2"].reshape(-1)
    for key, value in _under(state, "generative_path.").items():
        name = _DECODER.sub(lambda match: _DECODER_NAMES[match[0]], key, count=1)
        named[f"mae.decoder.{name}"] = value.reshape(-1) if name == "mask_token" else value
    for key, value in _under(state, "mlm_head.").items():
        named["mlm.decoder." + _WORDS.sub(lambda match: _WORD_NAMES[match[0]], key, count=1)] = value
    named |= _head("text_distillation.head", _under(state, "text_student.distillation_head."))
    named |= _head("text_distillation.teacher_head", _under(state, "text_teacher.distillation_head."))
    named["text_distillation.centre.mean"] = state["text_distillation_path.text_distillation_loss.center"].reshape(-1)
    return named


_DECODER_NAMES = {
    "decoder_pos_embed": "positions",
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "pixels",
}
_DECODER = re.compile("|".join(f"^{name}" for name in _DECODER_NAMES))
_WORD_NAMES = {"backbone": "transformer", "text_norm": "norm", "head": "words"}
_WORDS = re.compile("|".join(f"^{name}" for name in _WORD_NAMES))


def _under(state: Mapping[str, Tensor], prefix: str) -> State:
    """The part of a state dict below a prefix, without it; aliases of the encoder inside other modules are left out."""
    below = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in below.items() if prefix != "generative_path." or not key.startswith(_ALIASES)}


_ALIASES = ("backbone.", "patch_embed.")


def _head(name: str, state: Mapping[str, Tensor]) -> State:
    """A prototype head: its weight-normalised layer has its length as `weight_g`, its direction as `weight_v`."""
    names = {"last_layer.weight_g": "prototypes.length", "last_layer.weight_v": "prototypes.direction"}
    return {f"{name}.{names.get(key, key)}": value for key, value in state.items()}


def load_published(student: Towers, teacher: Towers, objectives: nn.ModuleDict, state: Mapping[str, Tensor]) -> None:
    """Load everything a published checkpoint holds: both models, heads, decoders and centres.

    Raises:
        UserError: a weight is missing, left over or of another shape; the message names the first.
    """
    load_exactly(student, towers_from_published(state, "student"), "the published student")
    load_exactly(teacher, towers_from_published(state, "teacher"), "the published teacher")
    load_exactly(objectives, objectives_from_published(state), "the published objectives")


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """`load_state_dict` in which every name and shape must fit; the error names the first that does not."""
    own = module.state_dict()
    for key in sorted(own.keys() - state.keys()):
        raise UserError(f"{what} has no weight for {key}; the model's settings differ from those it was trained with")
    for key in sorted(state.keys() - own.keys()):
        raise UserError(f"{what} has a weight {key} that the model has no place for; the model's settings differ")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(f"{what} has {key} of shape {tuple(value.shape)}, the model {tuple(own[key].shape)}")
    module.load_state_dict(dict(state))
