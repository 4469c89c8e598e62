"""Recorded steps of the published code, rebuilt with this package's towers, objectives, plan and teacher."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.data.views import ViewConfig
from harmony.interchange.published import load_published
from harmony.models.settings import ModelConfig
from harmony.models.towers import Towers
from harmony.objectives.registry import kinds
from harmony.schedules import Clock
from harmony.training.learner import Learner


@dataclass
class GoldenStep:
    """One recorded step: settings, expected numbers, and the learner and batch that must reproduce them."""

    config: dict[str, Any]
    losses: dict[str, float]
    arrays: dict[str, np.ndarray]
    learner: Learner
    batch: Batch

    @property
    def clock(self) -> Clock:
        per_epoch = self.config["iterations_per_epoch"]
        return Clock(self.config["iteration"], self.config["epochs"] * per_epoch, per_epoch)

    def array(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


def read_golden(stem: Path, joint: bool = False) -> GoldenStep:
    """Read NAME.json and NAME.npz."""
    record = json.loads(stem.with_suffix(".json").read_text())
    with np.load(stem.with_suffix(".npz")) as file:
        arrays = {name: file[name] for name in file.files}
    config = record["config"]
    learner = _learner(config, arrays, joint)
    state = {
        name[len("state.") :]: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("state.")
    }
    load_published(learner.student, learner.teacher, learner.objectives, state)
    return GoldenStep(config, record["losses"], arrays, learner.double(), _batch(config, arrays))


def views_of(config: dict[str, Any]) -> dict[str, ViewConfig]:
    return {
        "global": ViewConfig(count=config["global_crops_number"], size=config["image"]),
        "local": ViewConfig(count=config["local_crops_number"], size=config["local"]),
    }


def _learner(config: dict[str, Any], arrays: dict[str, np.ndarray], joint: bool) -> Learner:
    head = {"prototypes": config["out_dim"], "hidden": config["head_hidden"], "bottleneck": config["head_bottleneck"]}
    words = arrays["state.text_student.distillation_head.last_layer.weight_g"].shape[0]
    patch_temperature = {
        "linear": {
            "from": config["warmup_teacher_patch_temp"],
            "to": config["teacher_patch_temp"],
            "over": f"{config['warmup_teacher_temp_epochs']} epochs",
        }
    }
    hard_weight = {
        "cosine": {
            "from": config["hard_labels_weight"],
            "to": config["hard_labels_weight_end"],
            "over": f"{config['hard_labels_weight_epochs']} epochs",
        }
    }
    settings: dict[str, dict[str, Any]] = {
        "clip": {"hard_weight": hard_weight, "max_scale": None},
        "dino": {
            "weight": config["lambda1"],
            "mask": "block",
            "head": head,
            "teacher_temperature": config["teacher_temp"],
        },
        "ibot": {"weight": config["lambda2"], "head": "dino", "teacher_temperature": patch_temperature},
        "mae": {
            "mask_ratio": config["mask_ratio"],
            "over_crops": "sum",
            "decoder": {
                "width": config["decoder_width"],
                "depth": config["decoder_depth"],
                "heads": config["decoder_heads"],
            },
        },
        "mlm": {"attention": "causal", "decoder": {"layers": config["mlm_layers"], "activation": "quick_gelu"}},
        "text_distillation": {
            "attention": "causal",
            "head": head | {"prototypes": words, "layers": 2},
            "teacher_temperature": patch_temperature,
            "centre_on": "probabilities",
        },
    }
    model = ModelConfig.model_validate(
        {
            "image": {
                "name": "vit_tiny_patch16_224",
                "size": config["image"],
                "patch": config["patch_size"],
                "width": config["width"],
                "depth": config["depth"],
                "heads": config["heads"],
                "drop_path": config["drop_path_rate"],
                "positions": "published",
            },
            "text": {
                "width": config["text_width"],
                "layers": config["text_layers"],
                "heads": config["text_heads"],
                "activation": "quick_gelu",
            },
            "embed": config["text_out"],
        }
    )
    towers, views, classes = Towers(model, config["image"]), views_of(config), kinds()
    objectives = {name: classes[name](classes[name].Config(**own), towers, views) for name, own in settings.items()}
    for objective in objectives.values():
        objective.borrow(objectives)
    return Learner(towers, objectives, views, joint=joint).train()


def _batch(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Batch:
    def get(name: str) -> Tensor:
        return torch.from_numpy(arrays[name])

    large, small = config["global_crops_number"], config["local_crops_number"]
    views = [get(f"input.view.{i}").double() for i in range(large + small)]
    blocks = torch.stack([get(f"input.mask.{i}").flatten(1) for i in range(large)])
    noise = torch.stack([get(f"input.mae_noise.{i}") for i in range(large)])
    visible = int(noise.shape[-1] * (1 - config["mask_ratio"]))
    removed = torch.ones_like(noise, dtype=torch.bool)
    removed.scatter_(-1, noise.argsort(dim=-1)[..., :visible], False)
    captions = get("input.captions")
    drawn = get("input.caption_mask_draw") & ~((captions == 49406) | (captions == 49407) | (captions == 0))
    longest = int((captions > 0).sum(1).max())
    examples = len(captions)
    return Batch(
        keys=[str(i) for i in range(examples)],
        chance=Chance(torch.arange(examples)),
        images={"global": torch.stack(views[:large]), "local": torch.stack(views[large:])},
        captions={"caption": captions[:, :longest]},
        masks={
            "block": Mask.of(blocks),
            "mae": Mask.of(removed, equal_counts=True),
            "words": Mask.of(drawn[:, :longest]),
        },
    )
