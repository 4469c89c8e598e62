"""MAE as transformers has it: ViTMAEForPreTraining and AdamW in a plain loop."""

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks.step import Work
from benchmarks.turns import Way, kept_by
from harmony.objectives.mae import Mae

DIFFERS = (
    "transformers' ViTMAE: it draws its masks in the step (ours come with the batch); no slow copy, no norms of the "
    "gradient, no look at whether the loss is finite, which our step has; scaled_dot_product_attention in both"
)


def build(work: Work) -> Way:
    """transformers' model of the recipe's sizes, on our crops."""
    recipe, tower = work.recipe, work.stepper.learner.student.image
    settings = recipe.objectives["mae"]
    assert isinstance(settings, Mae.Config)
    decoder = settings.decoder
    config = ViTMAEConfig(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        intermediate_size=4 * tower.width,
        layer_norm_eps=1e-6,
        image_size=recipe.views[settings.view].size,
        patch_size=tower.patch,
        decoder_num_attention_heads=decoder.heads,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_intermediate_size=4 * decoder.width,
        mask_ratio=settings.mask_ratio.start,
        norm_pix_loss=settings.normalise_targets,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(work.device).train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=recipe.optim.betas, eps=recipe.optim.eps, weight_decay=0.05, fused=True
    )

    def step(number: int) -> torch.Tensor:
        batch = work.batches[number % len(work.batches)]
        with work.autocast():
            total: torch.Tensor = model(batch.images[settings.view][0]).loss
        total.backward()
        optimiser.step()
        optimiser.zero_grad()
        return total.detach()

    return Way("transformers", step, lambda: kept_by([model], optimiser))
