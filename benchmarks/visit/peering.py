"""`peers`: our step in turn with open_clip's, transformers' ViTMAE and plain parts of DINO and iBOT, in bf16."""

from functools import partial

from benchmarks.peers.compare import NAMES, compare
from benchmarks.visit.running import Found, Setting, Stage, Task

SIZES = {
    # peer: image tower, batch
    "clip": ("vit_base_patch16_224", 256),
    "mae": ("vit_base_patch16_224", 256),
    "dino": ("vit_small_patch16_224", 64),
    "ibot": ("vit_small_patch16_224", 64),
    "ibot-needed": ("vit_small_patch16_224", 64),
}

_IMAGE = "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 1, heads: 2}"
_CROPS = ("views.global.size=32", "views.local={count: 2, size: 16}")
_HEAD = "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}"
TINY = {
    "clip": (
        *(_IMAGE, "views.global.size=32", "model.embed=16"),
        "model.text={width: 16, layers: 1, heads: 2, context: 16, activation: gelu}",
    ),
    "mae": (_IMAGE, "views.global.size=32", "objectives.mae.decoder={width: 16, depth: 1, heads: 2}"),
    "dino": (_IMAGE, *_CROPS, _HEAD),
    "ibot": (_IMAGE, *_CROPS, _HEAD),
    "ibot-needed": (_IMAGE, *_CROPS, _HEAD),
}


def tasks(setting: Setting) -> Stage:
    """Every peer, or those that the options name; on ViT-S and B again at other batches where time is left."""
    asked = setting.options or (("clip", "mae", "ibot-needed") if setting.tiny else NAMES)
    chosen = [name for name in NAMES if name in asked]
    for name in chosen:
        arch, batch = SIZES[name]
        yield Task(name, partial(_compared, setting, name, arch, batch), 60)
    if setting.tiny:
        return
    for name in chosen:
        other = "vit_small_patch16_224" if SIZES[name][0].startswith("vit_base") else "vit_base_patch16_224"
        yield Task(f"{name} {other}", partial(_compared, setting, name, other, SIZES[name][1] // 2), 60)


def _compared(setting: Setting, name: str, arch: str, batch: int) -> Found:
    if setting.tiny:
        found = compare(name, setting.device, list(TINY[name]), None, 2, "bf16", rounds=1, warmup=1)
    else:
        found = compare(name, setting.device, [], arch, batch, "bf16", rounds=20, warmup=5)
    if "left_out" in found:
        return found
    shown = {key: found[key] for key in ("image_tower", "batch", "times", "times_by_round", "memory_share")}
    return {**shown, "ours_s": found["ours"]["step_s"], "theirs_s": found["theirs"]["step_s"], "details": found}
