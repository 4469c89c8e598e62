"""`step`: Harmony's step on ViT-B, S and L in bf16, by batch up to the largest that fits, and where its time goes."""

from dataclasses import dataclass
from functools import partial

from benchmarks.step import measure, recipe_of
from benchmarks.tiny import TINY_HARMONY
from benchmarks.visit.running import Found, Setting, Stage, Task


@dataclass(frozen=True)
class Sweep:
    """Batches of one image tower.

    Attributes:
        arch: its name.
        first: the batch to begin with; it doubles from there.
        changes: further settings of the recipe.
    """

    arch: str
    first: int
    changes: tuple[str, ...] = ()


SWEEPS = (
    Sweep("vit_base_patch16_224", 96),
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
"""Settings that are measured at the first batch of the first tower, each by itself."""


_LARGEST = 4096


def tasks(setting: Setting) -> Stage:
    """The first tower at its first batch, the sweeps, then WAYS.

    Options are settings of the recipe in all of them, and words such as `base` or `ways`, which choose among the parts.
    """
    words = [word for word in setting.options if "=" not in word]
    sweeps = (Sweep("tiny", 2),) if setting.tiny else SWEEPS
    for number, sweep in enumerate(sweeps):
        if not words or any(word in sweep.arch for word in words):
            yield from _swept(setting, sweep, kernels=0 if number else 40)
    if not setting.tiny and (not words or "ways" in words):
        arch, batch = SWEEPS[0].arch, SWEEPS[0].first
        for changes in WAYS:
            name = f"{arch} {' '.join(changes)} alone, batch {batch}"
            yield Task(name, partial(_measured, setting, Sweep(arch, batch, changes), batch), 60)


def _swept(setting: Setting, sweep: Sweep, kernels: int) -> Stage:
    """Batches from the first to one that does not fit, then one between; the first is profiled where asked for."""
    name, guess = " ".join([sweep.arch, *sweep.changes, "batch"]), 40.0
    batch, fits, found = sweep.first, 0, None
    while batch <= (sweep.first if setting.tiny else _LARGEST):
        found = yield Task(f"{name} {batch}", partial(_measured, setting, sweep, batch, kernels), guess)
        if found is None or "failed" in found:
            break
        fits, batch, kernels, guess = batch, 2 * batch, 0, max(guess, 2 * found["seconds"])
    if fits and found is not None and "failed" in found:
        between = 3 * fits // 2
        yield Task(f"{name} {between}", partial(_measured, setting, sweep, between), guess)


def _measured(setting: Setting, sweep: Sweep, batch: int, kernels: int = 0) -> Found:
    """What `python -m benchmarks.step` measures, with the longest kernels where asked for; most for the file alone."""
    changes = [*setting.options, *sweep.changes, *(TINY_HARMONY if setting.tiny else ())]
    arch, precision = sweep.arch, "bf16"
    if setting.tiny:  # many CPUs take minutes to multiply in bf16
        arch, precision = None, "fp32"
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
