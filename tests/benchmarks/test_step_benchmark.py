"""The benchmark of the step runs, and what it reports adds up."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import meetings, step
from benchmarks.step import prepare, recipe_of
from benchmarks.tiny import TINY_HARMONY
from harmony import recipe_files

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("step") / "step.json"
    step.main(
        [
            "quickstart",
            *TINY_HARMONY,
            "--batch=4",
            "--steps=2",
            "--warmup=1",
            "--profile=5",
            "--device=cpu",
            f"--json={out}",
        ]
    )
    return json.loads(out.read_text())


def test_parts_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch):
    """By a clock that goes on by one second whenever it is read, so that nothing depends on the machine."""
    readings = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(readings)))
    found = step.measure(recipe_of("quickstart", [*TINY_HARMONY], None, 4, "fp32"), CPU, steps=2)
    first, second = found["steps_s"]
    assert first == second == sum(found["parts_s"].values()) + 2, (
        "one reading before the first part, one behind the last"
    )


def test_parts_are_named_by_what_ran(found: dict):
    named = {"teacher", "clip: forward", "dino+ibot: backward", "mae: forward", "update: optimiser", "update: teacher"}
    assert named <= set(found["parts_s"])


def test_rates_follow_from_the_time_and_the_count_of_operations(found: dict):
    assert found["pairs_per_s"] == pytest.approx(4 / found["step_s"])
    assert found["flops_per_s"] == pytest.approx(found["flops_per_pair"] * found["pairs_per_s"])
    assert found["utilisation"] == pytest.approx(found["flops_per_s"] / found["matmul_flops_per_s"])
    assert found["caption_tokens"] == 16, "as many as the context holds"


def test_memory_grows_from_the_empty_process_to_the_peak(found: dict):
    memory = found["memory_gib"]
    assert 0 < memory["empty"] <= memory["ready"] <= memory["peak"]


def test_the_profile_lists_the_longest_first(found: dict):
    seconds = [kernel["s"] for kernel in found["kernels"]]
    assert len(seconds) == 5
    assert seconds == sorted(seconds, reverse=True)


SMALL = sorted(
    name for name in recipe_files.names() if name.endswith("-small") and not name.startswith(("beit", "flickr8k"))
)


@pytest.mark.parametrize("name", SMALL)
def test_no_step_waits_for_the_device_nor_does_one_that_is_logged(name: str):
    work = prepare(recipe_of(name, [], None, 4, "fp32"), CPU)
    work.step(0)
    for logged in (False, True):
        with meetings.counted(CPU) as waits:
            work.step(1, logged)
        assert not waits


def test_a_wait_within_a_step_is_found_where_it_is():
    work = prepare(recipe_of("clip-small", [], None, 4, "fp32"), CPU)
    norms = work.stepper.gradients.norms
    work.stepper.gradients.norms = lambda: norms() * norms().sum().item()
    with meetings.counted(CPU) as waits:
        work.step(0)
    assert sum(waits.values()) == 1 and all("test_step_benchmark.py" in place for place in waits)


def test_a_recipe_of_images_alone_is_measured_too(tmp_path: Path):
    out = tmp_path / "mae.json"
    small = ("model.image.width=16", "model.image.heads=2", "model.image.depth=1", "views.global.size=32")
    decoder = "objectives.mae.decoder={width: 16, depth: 1, heads: 2}"
    step.main(["mae-small", *small, decoder, "--batch=2", "--steps=1", "--warmup=1", "--device=cpu", f"--json={out}"])
    assert json.loads(out.read_text())["caption_tokens"] == 0


def _list(x: Tensor):
    return x.tolist()


def _number(x: Tensor):
    return x.sum().item()


def _choice(x: Tensor):
    return 1 if x[0] > 0 else 0


def _places(x: Tensor):
    return x.nonzero()


def _chosen(x: Tensor):
    return x[x > 0]


@pytest.mark.parametrize("reads", [_list, _number, _choice, _places, _chosen])
def test_everything_that_would_wait_is_counted_once_where_it_stands(reads):
    with meetings.counted(CPU) as waits:
        reads(torch.arange(4.0))
    assert dict(waits) == {f"tests/benchmarks/test_step_benchmark.py:{reads.__code__.co_firstlineno + 1}": 1}


def test_arithmetic_does_not_wait():
    x = torch.randn(4, requires_grad=True)
    with meetings.counted(CPU) as waits:
        (x[torch.tensor([0, 2])].exp() @ x[:2]).backward()
    assert not waits


def test_the_options_reach_the_recipe():
    recipe = step.recipe_of("clip", ["efficiency.checkpointing=blocks"], "vit_small_patch16_224", 6, "bf16")
    assert (recipe.model.image.name, recipe.data.batch_size, recipe.train.precision) == (
        "vit_small_patch16_224",
        6,
        "bf16",
    )
    assert recipe.efficiency.checkpointing == "blocks"
    assert recipe.efficiency.augment == "worker"


@pytest.mark.parametrize("name", ["step", "scaling", "peers", "loader"])
def test_a_typo_is_told_in_a_sentence(name: str):
    command = [sys.executable, "-m", f"benchmarks.{name}", "train.stps=3"]
    if name == "loader":
        command = [*command[:-1], "--data", "shards:nowhere/*.tar"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("benchmarks: ") and len(done.stderr.splitlines()) == 1
