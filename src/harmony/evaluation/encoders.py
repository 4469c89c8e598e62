"""The encoder that a name stands for.

RUN or CHECKPOINT               a run directory (its newest checkpoint is taken) or a checkpoint directory
timm:NAME                       a timm model with its pretrained weights, see harmony.evaluation.timm_encoder
open_clip:ARCH/TAG              an open_clip model, both towers, see harmony.evaluation.open_clip_encoder
timm:NAME?weights=FILE, open_clip:ARCH?weights=FILE     the same with weights of one's own
published:FILE                  a checkpoint of the published Harmony code
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harmony import recipe as recipes
from harmony.data.captions import Tokenizer
from harmony.errors import UserError, unknown
from harmony.evaluation.encoder import Encoder, Encoding, Layer, hash_of, off_patch
from harmony.evaluation.open_clip_encoder import load_open_clip
from harmony.evaluation.timm_encoder import load_timm
from harmony.interchange.published import load_exactly, read_published, sizes_from_published, towers_from_published
from harmony.models.towers import Towers
from harmony.models.trunk import create_trunk
from harmony.models.vision import ImageTower
from harmony.recipe import Recipe
from harmony.training.trained import MODELS, read_trained

ELSEWHERE = {"timm": load_timm, "open_clip": load_open_clip}
"""What opens models of other libraries."""


class TowersEncoder(Encoder):
    """The towers of a run.

    Attributes:
        towers: both, in evaluation mode.
        recipe: what they were trained with.
    """

    def __init__(self, name: str, towers: Towers, recipe: Recipe, device: torch.device) -> None:
        self.name = name
        self.towers = towers.to(device).eval().requires_grad_(False)
        self.recipe = recipe
        self.device = device
        self.size = recipe.largest_view
        self.patch, self.width, self.depth = towers.image.patch, towers.image.width, towers.image.depth
        self.mean, self.std = recipe.model.image.mean, recipe.model.image.std
        self.embed = towers.embed
        self.reads_text = towers.text is not None
        text = recipe.model.text
        self._tokenizer = Tokenizer(text.context, text.truncation) if text is not None else None

    def fingerprint(self) -> str:
        # The number of heads, the activation and the like change what is computed, but no weight's name or shape.
        how = self.recipe.model.model_dump_json(exclude={"init": True, "image": {"drop_path"}})
        return hash_of(self.towers.state_dict().items(), how)

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        image = self.towers.image
        for side in pixels.shape[-2:]:
            _check_size(side, image.patch)
        wanted = tuple(range(image.depth - layers, image.depth))
        encoding = image.encode(pixels, wanted)
        grid = (pixels.shape[-2] // image.patch, pixels.shape[-1] // image.patch)
        normed = [image.trunk.norm(encoding.layers[index]) for index in wanted]
        maps = [tokens[:, image.prefix :].transpose(1, 2).unflatten(2, grid) for tokens in normed]
        return Encoding(
            encoding.embed(),
            [Layer(tokens[:, 0], patches) for tokens, patches in zip(normed, maps, strict=True)],
        )

    @torch.no_grad()
    def shared(self, patches: Tensor) -> Tensor:
        embedded: Tensor = self.towers.image.proj(patches.movedim(1, -1))
        return embedded.movedim(-1, 1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        if self.towers.text is None or self._tokenizer is None:
            raise UserError(f"{self.name} has no text tower; use a model that was trained on captions")
        return self.towers.text(self._tokenizer.encode(list(texts)).to(self.device))

    def backbone(self, size: int, drop_path: float = 0.0) -> nn.Module:
        return trainable(self.towers.image, self.recipe, size, drop_path).to(self.device)


def trainable(tower: ImageTower, recipe: Recipe, size: int, drop_path: float) -> VisionTransformer:
    """The tower's trunk as a timm model of its own, for inputs of `size` px."""
    _check_size(size, tower.patch)
    trained_at: int = tower.trunk.patch_embed.img_size[0]
    model = create_trunk(recipe.model.image, trained_at, drop_path)
    model.load_state_dict(tower.trunk.state_dict())
    if size != trained_at:
        model.set_input_size(img_size=(size, size))
    model.requires_grad_(True)
    return model


def _check_size(size: int, patch: int) -> None:
    reason = off_patch(size, patch)
    if reason:
        raise UserError(reason)


def load_encoder(where: str, model: str | None = None, device: torch.device | str | None = None) -> Encoder:
    """The encoder that `where` names.

    Args:
        where: see the module's text.
        model: "teacher", "student" or "untrained"; None is what a run's recipe names (`evaluation.model`: the student
            of a method without a teacher), and the teacher of a published checkpoint. A model of timm or open_clip has
            no teacher: the word is ignored; untrained is its architecture with weights drawn from a fixed seed.
        device: where it computes; a GPU when there is one.

    Raises:
        UserError: there is no such model, or some weight is missing, left over, of another shape or not finite.
            An encoder whose weights did not load completely is never evaluated.
    """
    if model not in (None, *MODELS):
        raise unknown("model", str(model), MODELS)
    kind, colon, name = where.partition(":")
    if colon and not name and kind in (*ELSEWHERE, "published"):
        raise UserError(f"{where} names nothing; write {kind}:{'FILE' if kind == 'published' else 'NAME'}")
    if colon and kind == "published":
        return load_published_towers(Path(name), model or "teacher", device)
    if not colon or kind not in ELSEWHERE:
        _check_scheme(where)
        return load_run(where, model, device)
    if model == "student":
        raise UserError(f"{where} is no run and has no student; leave --model out")
    name, weights = _weights_of(where, name)
    return ELSEWHERE[kind](name, weights, model == "untrained", _device(device))


def _weights_of(where: str, name: str) -> tuple[str, Path | None]:
    """NAME and FILE of NAME?weights=FILE."""
    name, mark, query = name.partition("?")
    if not mark:
        return name, None
    key, _, file = query.partition("=")
    if key != "weights" or not file:
        raise UserError(f"{where} says ?{query}; the one thing that may follow a model's name is ?weights=FILE")
    return name, Path(file)


def _check_scheme(where: str) -> None:
    """Raise UserError for a file, and for a word before a colon that was perhaps meant to be another."""
    kind, colon, _ = where.partition(":")
    if Path(where).is_file():
        raise UserError(
            f"{where} is a file, which does not say what model it is for; write timm:NAME?weights={where}, "
            f"open_clip:ARCH?weights={where} or published:{where}"
        )
    if colon and kind.isidentifier() and not Path(where).exists():
        raise unknown("kind of model", kind, [*ELSEWHERE, "published"])


def load_run(where: str, model: str | None = None, device: torch.device | str | None = None) -> TowersEncoder:
    """The towers of a run or of one of its checkpoints. Arguments and errors as for `load_encoder`."""
    trained = read_trained(where, model)
    return TowersEncoder(trained.name, trained.towers, trained.recipe, _device(device))


def load_published_towers(
    file: Path, model: str = "teacher", device: torch.device | str | None = None
) -> TowersEncoder:
    """The towers of a checkpoint of the published Harmony code. Arguments and errors as for `load_encoder`."""
    state = towers_from_published(read_published(file), "teacher" if model == "teacher" else "student")
    recipe = recipes.load("harmony-published", ["data.train=scenes:", *sizes_from_published(state)])
    torch.manual_seed(recipe.train.seed)
    towers = Towers(recipe.model, recipe.largest_view)
    if model != "untrained":
        load_exactly(towers, state, f"the {model} of published:{file}")
    return TowersEncoder(f"published:{file} ({model})", towers, recipe, _device(device))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
