"""CLIP as open_clip trains it: its model, its ClipLoss, AdamW, in the loop of its documentation."""

import math
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP

from benchmarks.step import Work
from benchmarks.turns import Way, kept_by
from harmony.interchange.export import Exported
from harmony.interchange.export_open_clip import written

DIFFERS = (
    "open_clip: no slow copy, no norms of the gradient, no look at whether the loss is finite, all of which are in our "
    "step; attention of the text tower by nn.MultiheadAttention, of the image tower by timm"
)


def build(work: Work) -> Way:
    """open_clip's model with our weights, on our crops and captions."""
    learner, recipe, device = work.stepper.learner, work.recipe, work.device
    form = written(Exported("clip", learner.student, recipe.model))
    config: dict[str, Any] = dict(form["open_clip_config.json"]["model_cfg"])
    config.pop("custom_text")
    model = CustomTextCLIP(**config, init_logit_scale=math.log(1 / 0.07)).to(device).train()
    model.load_state_dict(form["open_clip_model.safetensors"], strict=False)
    loss = open_clip.ClipLoss()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=recipe.optim.betas, eps=recipe.optim.eps, weight_decay=0.2, fused=True
    )
    view = recipe.objectives["clip"].view  # type: ignore[attr-defined]

    def step(number: int) -> float | torch.Tensor:
        batch = work.batches[number % len(work.batches)]
        with work.autocast():
            image, text, scale, *_ = model(batch.images[view][0], batch.captions["caption"])
            total: torch.Tensor = loss(image, text, scale)
        total.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return total.detach()

    return Way("open_clip", step, lambda: kept_by([model], optimiser))
