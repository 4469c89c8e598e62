"""A Harmony of the smallest sizes, which shows that a benchmark runs and measures nothing."""

TINY_HARMONY = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 2, heads: 2, drop_path: 0.3}",
    "model.text={width: 16, layers: 1, heads: 2, context: 16}",
    "model.embed=16",
    "views.global={size: 32}",
    "views.local={count: 2, size: 16}",
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation.head={prototypes: 24, hidden: 16, bottleneck: 8}",
)
