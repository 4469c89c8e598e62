"""The encoder that a name stands for.

RUN or CHECKPOINT       a run directory (its newest checkpoint is taken) or a checkpoint directory
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from harmony import recipe as recipes
from harmony.data.captions import Tokenizer
from harmony.errors import UserError, unknown
from harmony.evaluation.encoder import Encoder, Encoding, Layer
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower, create_trunk
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.run_directory import RunDirectory

MODELS = ("teacher", "student", "untrained")
"""What `--model` may say of a run; untrained is its model as drawn before the first step."""


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
        text = self.recipe.model.text
        how = (self.mean, self.std, self.recipe.model.image.positions, text and (text.context, text.truncation))
        return hash_of(self.towers.state_dict().items(), str(how))

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        image = self.towers.image
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
    if size % tower.patch:
        below, above = size // tower.patch * tower.patch, (size // tower.patch + 1) * tower.patch
        raise UserError(f"size {size} is not a multiple of the patch size {tower.patch}; set it to {below} or {above}")
    trained_at: int = tower.trunk.patch_embed.img_size[0]
    model = create_trunk(recipe.model.image, trained_at, drop_path)
    model.load_state_dict(tower.trunk.state_dict())
    if size != trained_at:
        model.set_input_size(img_size=(size, size))
    model.requires_grad_(True)
    return model


def load_encoder(where: str, model: str = "teacher", device: torch.device | str | None = None) -> Encoder:
    """The encoder that `where` names.

    Args:
        where: see the module's text.
        model: "teacher", "student" or "untrained", for a run.
        device: where it computes; a GPU when there is one.

    Raises:
        UserError: there is no such model, or some weight is missing, left over, of another shape or not finite.
            An encoder whose weights did not load completely is never evaluated.
    """
    return load_run(where, model, device)


def load_run(where: str, model: str = "teacher", device: torch.device | str | None = None) -> TowersEncoder:
    """The towers of a run or of one of its checkpoints. Arguments and errors as for `load_encoder`."""
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    checkpoint = find_checkpoint(where)
    recipe = recipes.load(checkpoint / "recipe.yaml")
    torch.manual_seed(recipe.train.seed)
    towers = Towers(recipe.model, recipe.largest_view)
    if model != "untrained":
        load_part(towers, checkpoints.read_model(checkpoint), model, str(checkpoint))
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TowersEncoder(f"{where} ({model})", towers, recipe, chosen)


def hash_of(weights: Iterable[tuple[str, Tensor]], how: str) -> str:
    """A hash of named tensors and of what else changes an encoder's output."""
    digest = hashlib.blake2b(how.encode(), digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_checkpoint(where: str) -> Path:
    """The checkpoint directory that is meant by a run directory or by itself.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if not path.is_dir():
        raise UserError(f"there is no directory {where!r}; name a run directory or one of its checkpoints")
    if (path / "model.safetensors").is_file():
        return path
    latest = RunDirectory(path).latest()
    inside = checkpoints.every(path)
    if latest is None and inside:
        raise UserError(f"{where} holds several checkpoints and is none itself; name the newest, {inside[-1]}")
    if latest is None:
        raise UserError(
            f"{where} holds no checkpoint; name a directory that `harmony train` wrote, or one of its checkpoints"
        )
    return latest


def load_part(module: nn.Module, weights: Mapping[str, Tensor], part: str, where: str) -> None:
    """Load the weights named `part`.* into a module, all of them or none.

    Raises:
        UserError: a weight is missing, left over, of another shape or not finite; names the first few.
    """
    own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
    expected = module.state_dict()
    faults = [
        ("missing", [name for name in expected if name not in own]),
        ("unexpected", [name for name in own if name not in expected]),
        ("of another shape", [n for n, value in expected.items() if n in own and own[n].shape != value.shape]),
        ("not finite", [name for name, value in own.items() if not value.isfinite().all()]),
    ]
    for fault, names in faults:
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"the weights of {part} in {where} cannot be used, {fault}: {shown}; "
                "evaluate a checkpoint that belongs to its recipe"
            )
    module.load_state_dict(own)
