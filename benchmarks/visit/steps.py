"""`step`: Harmony's step on ViT-B, S and L in bf16, by batch up to the largest that fits, and where its time goes."""

from dataclasses import dataclass
from functools import partial

from benchmarks.step import measure, recipe_of
from benchmarks.visit.running import Found, Setting, Stage, Task


@dataclass(frozen=True)
class Sweep:
    """Batches of one image tower.

    Attributes:
        arch: its name.
        first: the batch to begin with; it doubles from there.
        changes: further settings of the recipe.
        details: whether the first batch is profiled, and measured in further ways.
    """

    arch: str
    first: int
    changes: tuple[str, ...] = ()
    details: bool = False


SWEEPS = (
    Sweep("vit_base_patch16_224", 96, details=True),
    Sweep("vit_small_patch16_224", 128),
    Sweep("vit_large_patch16_224", 48),
    Sweep("vit_large_patch16_224", 48, ("efficiency.checkpointing=blocks",)),
)

WAYS = (
    ("efficiency.compile=true",),
    ("efficiency.deterministic=false",),
    ("efficiency.checkpointing=pointwise",),
    ("efficiency.checkpointing=blocks",),
    ("efficiency.backward=joint",),
)
"""Settings that are measured at the first batch of the first tower."""

TINY_RECIPE = (
    "model.image={name: vit_tiny_patch16_224, patch: 8, width: 16, depth: 1, heads: 2}",
    "model.text={width: 16, layers: 1, heads: 2, context: 16}",
    "model.embed=16",
    "views.global={size: 32}",
    "views.local={count: 2, size: 16}",
    "objectives.dino.head={prototypes: 24, hidden: 16, bottleneck: 8}",
    "objectives.mae.decoder={width: 16, depth: 1, heads: 2}",
    "objectives.text_distillation.head={prototypes: 24, hidden: 16, bottleneck: 8}",
)

_LARGEST = 4096


def tasks(setting: Setting) -> Stage:
    """Sweeps in the order of SWEEPS; options are settings of the recipe in all of them."""
    sweeps = (Sweep("tiny", 2, details=True),) if setting.tiny else SWEEPS
    for sweep in sweeps:
        name = " ".join([sweep.arch, *sweep.changes])
        guess = 40.0
        kernels = 40 if sweep.details else 0
        first = yield Task(
            f"{name} batch {sweep.first}", partial(_measured, setting, sweep, sweep.first, kernels), guess
        )
        if first is None or "failed" in first or setting.tiny:
            continue
        if sweep.details:
            for changes in WAYS:
                one = Sweep(sweep.arch, sweep.first, changes)
                yield Task(f"{name} {' '.join(changes)}", partial(_measured, setting, one, sweep.first), 2 * guess)
        fits, batch = sweep.first, 2 * sweep.first
        while batch <= _LARGEST:
            found = yield Task(f"{name} batch {batch}", partial(_measured, setting, sweep, batch), guess)
            if found is None or "failed" in found:
                break
            fits, batch, guess = batch, 2 * batch, max(guess, 2 * found["seconds"])
        else:
            continue
        if found is not None:  # it did not fit: something between may
            between = 3 * fits // 2
            yield Task(f"{name} batch {between}", partial(_measured, setting, sweep, between), guess)


def _measured(setting: Setting, sweep: Sweep, batch: int, kernels: int = 0) -> Found:
    """What `python -m benchmarks.step` measures, the longest kernels with it where asked for; most for the file alone."""
    changes = [*setting.options, *sweep.changes, *(TINY_RECIPE if setting.tiny else ())]
    arch, precision = (
        (None, "fp32") if setting.tiny else (sweep.arch, "bf16")
    )  # many CPUs take minutes to multiply in bf16
    recipe = recipe_of("harmony", changes, arch, batch, precision)
    steps, warmup = (1, 1) if setting.tiny else (8, 4)
    found = measure(recipe, setting.device, 77, steps, warmup, kernels)
    shown = {key: found[key] for key in ("step_s", "pairs_per_s", "utilisation", "utilisation_of_matmul", "host_waits")}
    memory = {key: value for key, value in found["memory_gib"].items() if key in ("ready", "peak")}
    shown |= {**memory, "memory_per_pair_mib": found["memory_per_pair_mib"], "details": found}
    if kernels:
        shown["busy"] = found["device_busy_s"] / found["profiled_step_s"]
        shown["parts_s"] = found["parts_s"]
        shown["longest"] = [[one["name"][:60], one["s"], one["calls"]] for one in found["kernels"][:12]]
    return shown
