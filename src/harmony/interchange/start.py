"""First weights of the towers: from timm, open_clip, a published Harmony checkpoint, a run or a plain file.

timm:NAME                       a timm model's pretrained weights (image tower)
open_clip:NAME/TAG              an open_clip model's weights (either tower)
published:FILE                  a checkpoint of the published Harmony code (either tower)
PATH                            a run, one of its checkpoints, or a file of weights named as timm's or open_clip's
"""

from collections.abc import Mapping
from pathlib import Path

import open_clip
import timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from harmony.errors import UserError
from harmony.interchange.published import load_exactly, read_published, towers_from_published
from harmony.interchange.weights import State, fetched, known_open_clip, known_timm, read_weights, timm_weights
from harmony.models.settings import InitConfig
from harmony.models.text import TextTower
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower


def start_from(towers: Towers, init: str | InitConfig | None) -> None:
    """Load what `init` names into the towers; one source for both, or one for each. None leaves them as drawn.

    Raises:
        UserError: the source does not exist, cannot be read, or does not fit the towers.
    """
    if init is None:
        return
    sources = InitConfig(image=init, text=init) if isinstance(init, str) else init
    both = isinstance(init, str)
    if sources.image is not None:
        _start_image(towers.image, weights_of(sources.image), sources.image)
    if sources.text is not None and towers.text is not None:
        state = weights_of(sources.text)
        # One source for both towers may hold an image tower alone, as every timm model does.
        if text_part(state) or not both:
            _start_text(towers.text, state, sources.text)


def weights_of(source: str, setting: str = "model.init") -> State:
    """The weights that a source holds, under timm's, open_clip's or `Towers`' names.

    Args:
        source: see the module's text.
        setting: the key that named it, for messages.
    """
    kind, _, name = source.partition(":")
    if kind == "timm" and name:
        return _from_timm(name)
    if kind == "open_clip" and name:
        return _from_open_clip(name)
    if kind == "published" and name:
        return towers_from_published(read_published(Path(name)), "teacher")
    return _from_path(Path(source), setting)


def file_of(source: str, setting: str = "model.init") -> Path | None:
    """The file that a source's weights are read from; None where they are fetched, and the name alone tells them."""
    kind, _, name = source.partition(":")
    if kind == "timm" and name:
        return None
    if kind == "open_clip" and name:
        tag = Path(name.partition("/")[2])
        return tag if tag.is_file() else None
    return Path(name) if kind == "published" and name else _file_at(Path(source), setting)


def _from_timm(name: str) -> State:
    known_timm(name, timm.list_models(module="vision_transformer"))
    return timm_weights(name, "give a local file instead")


def _from_open_clip(name: str) -> State:
    architecture, _, tag = name.partition("/")
    known_open_clip(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and not Path(tag).is_file():
        raise UserError(
            f"open_clip:{name} names no weights; write open_clip:{architecture}/TAG with TAG one of {', '.join(tags)}"
        )
    model = fetched(
        lambda: open_clip.create_model(architecture, pretrained=tag), f"open_clip:{name}", "give a local file"
    )
    return dict(model.state_dict())


def _from_path(path: Path, setting: str) -> State:
    state = read_weights(_file_at(path, setting))
    # A run starts another one from its teacher, which is what is evaluated too.
    own = {key.removeprefix("teacher."): value for key, value in state.items() if key.startswith("teacher.")}
    return own or state


def _file_at(path: Path, setting: str) -> Path:
    """The file itself, or the last one of a run or checkpoint."""
    if path.is_dir():
        found = sorted(path.glob("checkpoints/step-*/model.safetensors")) + sorted(path.glob("model.safetensors"))
        if not found:
            raise UserError(f"{path} is neither a run nor a checkpoint (no model.safetensors in it); check {setting}")
        path = found[-1]
    if not path.is_file():
        raise UserError(
            f"{setting} names {str(path)!r}, which does not exist; give timm:NAME, open_clip:NAME/TAG, "
            "published:FILE, a run or a file of weights"
        )
    return path


def _start_image(tower: ImageTower, state: State, source: str) -> None:
    """Fill the image tower, with mask token and projection where the source has them."""
    extra = fill_trunk(tower.trunk, state, source, "model.image", "model.init")
    rest = {"mask_token": tower.mask_token.detach(), "proj.weight": tower.proj.weight.detach()} | extra
    load_exactly(
        tower, {f"trunk.{k}": v for k, v in tower.trunk.state_dict().items()} | rest, f"{source}, for model.image,"
    )


def fill_trunk(trunk: VisionTransformer, state: State, source: str, model: str, setting: str) -> State:
    """Fill a timm model from a state dict of ours, timm's or open_clip's; positions are resized to its grid.

    Args:
        trunk: the model.
        state: the weights.
        source: where they come from, for messages.
        model: the key of the model's settings, likewise.
        setting: the key that named the source, likewise.

    Returns:
        What else the source holds of an `ImageTower`: its mask token and projection.
    """
    own = _under(state, "image.")
    if own:
        weights, extra = _under(own, "trunk."), {k: v for k, v in own.items() if not k.startswith("trunk.")}
    else:
        visual = _under(state, "visual.")
        weights = _under(visual, "trunk.") or ({f"visual.{k}": v for k, v in visual.items()} if visual else dict(state))
        extra = _projection(visual)
    if not any(key.endswith(("patch_embed.proj.weight", "conv1.weight")) for key in weights):
        raise UserError(f"{source} holds no image tower (no patch embedding in it); check {setting}")
    weights = checkpoint_filter_fn(weights, trunk, interpolation="bicubic", antialias=True)
    weights = {key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm.", "attn_pool."))}
    load_exactly(trunk, weights, f"{source}, for {model},")
    return extra


def _projection(visual: State) -> State:
    """The projection of an open_clip image tower, which has it as a linear layer or as a matrix."""
    if "head.proj.weight" in visual:
        return {"proj.weight": visual["head.proj.weight"]}
    return {"proj.weight": visual["proj"].T.contiguous()} if "proj" in visual else {}


def text_part(state: State) -> State:
    """The part of a state dict that is a text tower, named as in TextTower; empty when there is none."""
    own = _under(state, "text.")
    if any(key.startswith("transformer.token_embedding") for key in own):
        return own
    if "token_embedding.weight" in own:
        return {f"transformer.{key}": value for key, value in own.items()}
    if "token_embedding.weight" not in state:
        return {}
    names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    return {f"transformer.{key}": value for key, value in state.items() if key.startswith(names)}


def _start_text(tower: TextTower, state: State, source: str) -> None:
    part = text_part(state)
    if not part:
        raise UserError(f"{source} holds no text tower; set model.init.text to a source that does, or to null")
    load_exactly(tower, {"mask_token": tower.mask_token.detach()} | part, f"{source}, for model.text,")


def _under(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
