"""Every stage of a visit runs in its tiny form, keeps its time, and tells what is wrong: no visit is lost to a typo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks import gpu_visit
from benchmarks.visit import peering, proofs, steps, training
from benchmarks.visit.running import Budget, Found, Setting, Stage, Task, brief, carry_out
from harmony.comparison.plan import plan_of
from harmony.training.settings import EfficiencyConfig
from harmony.training.step import Stepper

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def visited(stage: str, folder: Path, *more: str) -> tuple[int, Found]:
    """Exit status and report of a stage's tiny form."""
    places = [f"--out={folder / 'out'}", f"--keep={folder / 'keep'}", "--device=cpu", "--workers=1", "--tiny"]
    status = gpu_visit.main([stage, *places, *more])
    return status, json.loads((folder / "out" / f"{stage}.json").read_text())


def setting_of(folder: Path, seconds: float = 100.0, tiny: bool = True, options: tuple[str, ...] = ()) -> Setting:
    return Setting(CPU, tiny, folder / "out", folder / "keep", folder, folder, 1, options, Budget(seconds))


@pytest.mark.parametrize("stage", ["correct", "step", "peers", "loader"])
def test_every_stage_runs(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, report = visited(stage, tmp_path)
    assert (status, report["failed"], report["wrong"], report["left_out"]) == (0, [], [], [])
    assert report["done"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["stage"] == stage
    assert "details" not in last
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert sum(path.stat().st_size for path in files) < 2**24


class Two:
    """A stage of two tasks that says what it was sent."""

    def __init__(self, first: Task) -> None:
        self.first, self.sent = first, []

    def tasks(self) -> Stage:
        self.sent.append((yield self.first))
        self.sent.append((yield Task("second", lambda: {"x": 1.0}, 0)))


def _fails() -> Found:
    raise ValueError("no such kernel\nmore")


def _out_of_memory() -> Found:
    raise torch.OutOfMemoryError("tried to allocate")


@pytest.mark.parametrize(
    ("run", "seconds", "kind"),
    [
        (_fails, 0, "failed"),
        (_out_of_memory, 0, "failed"),
        (lambda: {"ok": False}, 0, "wrong"),
        (_fails, 1e6, "left_out"),
    ],
)
def test_what_one_task_does_stops_no_other(run, seconds: float, kind: str, tmp_path: Path):
    two = Two(Task("first", run, seconds))
    report = carry_out("two", two.tasks(), setting_of(tmp_path), {})
    assert report[kind] == ["first"]
    assert sum(len(report[each]) for each in ("failed", "wrong", "left_out")) == 1
    assert (two.sent[0] is None) == (kind == "left_out")
    assert report["done"]["second"]["x"] == 1
    assert json.loads((tmp_path / "out" / "two.json").read_text()) == report


def test_a_task_that_does_not_end_is_broken_off(tmp_path: Path):
    setting = Setting(CPU, True, tmp_path, tmp_path, tmp_path, tmp_path, 1, (), Budget(0.2, grace=0.1))
    begun = time.monotonic()
    report = carry_out("slow", Two(Task("first", partial(time.sleep, 60), 0)).tasks(), setting, {})
    assert time.monotonic() - begun < 10
    assert "OutOfTimeError" in report["done"]["first"]["failed"]
    assert report["left_out"] == ["second"]


def test_a_stage_that_breaks_keeps_what_it_found(tmp_path: Path):
    def tasks() -> Stage:
        yield Task("first", lambda: {"x": 1.0}, 0)
        raise KeyError("who")

    report = carry_out("broken", tasks(), setting_of(tmp_path), {})
    assert report["done"]["first"]["x"] == 1
    assert report["failed"] == ["broken itself: KeyError: 'who'"]


def test_the_screen_gets_no_details():
    assert brief({"a": [{"details": 1, "b": 0.123456}], "details": {}}) == {"a": [{"b": 0.1235}]}


def outcomes(folder: Path):
    proofs._see_tests()
    work = proofs.prepare(proofs._small("swav"), CPU)
    return work, proofs._outcome_of(work, torch.float32)


def test_a_wrong_gradient_and_a_wrong_loss_are_noticed(tmp_path: Path):
    _, right = outcomes(tmp_path)
    assert proofs._judged("x", right, right, (0, 0))["x_ok"]
    name = max(right.gradients, key=lambda n: right.gradients[n].norm())
    for factor in (1.01, float("nan")):
        gradients = right.gradients | {name: right.gradients[name] * factor}
        found = proofs._judged("x", proofs.Outcome(right.losses, gradients), right, (1e-4, 1e-3))
        assert not found["x_ok"]
        losses = {loss: factor * value for loss, value in right.losses.items()}
        assert not proofs._judged("x", proofs.Outcome(losses, right.gradients), right, (1e-4, 1e-3))["x_ok"]
    less = {n: g for n, g in right.gradients.items() if n != name}
    assert not proofs._judged("x", proofs.Outcome(right.losses, less), right, (1, 10))["x_ok"], "one is missing"


def test_every_value_of_every_efficiency_setting_is_proven():
    tried = {word for settings in (*proofs.SETTINGS, *proofs.COMPILED) for word in settings}
    for name, field in EfficiencyConfig.model_fields.items():
        for value in (True, False) if field.annotation is bool else get_args(field.annotation):
            if value != field.default and name != "augment":  # colours are not changed on random pixels
                assert f"efficiency.{name}={value}".lower() in tried


def sent(stage: Stage, answer) -> list[str]:
    """The names of a stage's tasks when each finds what `answer` says."""
    names, found = [], None
    while True:
        try:
            task = stage.send(found)
        except StopIteration:
            return names
        names.append(task.name)
        found = answer(task.name)


def fitting(most: int):
    def answer(name: str) -> Found:
        return {"failed": "out of memory"} if int(name.rpartition("batch ")[2]) > most else {"seconds": 1.0}

    return answer


def test_batches_double_until_one_does_not_fit(tmp_path: Path):
    names = sent(steps.tasks(setting_of(tmp_path, tiny=False)), fitting(400))
    base = [int(name.split()[-1]) for name in names if re.fullmatch(r"vit_base_patch16_224 batch \d+", name)]
    assert base == [96, 192, 384, 768, 576]
    assert sum("alone" in name for name in names) == len(steps.WAYS)


def test_a_tower_whose_first_batch_fails_is_passed_over(tmp_path: Path):
    names = sent(steps.tasks(setting_of(tmp_path, tiny=False)), fitting(0))
    assert len(names) == len(steps.SWEEPS) + len(steps.WAYS)


def test_words_choose_among_the_towers(tmp_path: Path):
    names = sent(steps.tasks(setting_of(tmp_path, tiny=False, options=("large", "views.local.count=2"))), fitting(0))
    assert len(names) == 2 and all(name.startswith("vit_large") for name in names)


def test_sizes_are_those_of_recipes_and_peers(tmp_path: Path):
    """The full form is validated here, though it is only run there."""
    for sweep in steps.SWEEPS:
        for changes in ((), *steps.WAYS):
            steps.recipe_of("harmony", [*sweep.changes, *changes], sweep.arch, sweep.first, "bf16")
    assert set(peering.SIZES) == set(peering.TINY) == set(peering.NAMES)
    assert len(sent(peering.tasks(setting_of(tmp_path, tiny=False)), lambda name: {})) > len(peering.NAMES)
    command = training.words(setting_of(tmp_path, tiny=False), tmp_path / "train")
    end = command.index("--seeds")
    plan = plan_of(command[1:end], [0], ["retrieval"], "a command")
    rows = {row.name: row.recipe for row in plan.rows}
    assert list(rows) == list(training.ROWS)
    assert {(r.model.image.name, r.largest_view, r.train.epochs, r.data.batch_size) for r in rows.values()} == {
        ("vit_small_patch16_224", 112, 40, 256)
    }


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project runs from its sources, as it does on a machine that is only visited."""
    found = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if name == "harmony":
            raise PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(Distribution, "from_name", from_name)


@pytest.mark.usefixtures("nothing_installed")
def test_training_goes_on_where_a_visit_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A visit whose time is over in the first step, then one with time, in the same folder."""
    step = Stepper.step

    def interrupted(*arguments, **more):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        first = training._compared(setting_of(tmp_path), tmp_path / "keep" / "train")
    assert (first["finished"], first["status"]) == (False, 130)
    assert "failed" not in first
    status, report = visited("train", tmp_path, "--data", str(tmp_path))
    assert (status, report["failed"], report["left_out"]) == (0, [], [])
    assert report["done"]["compare"]["finished"]
    runs = report["done"]["what there is"]["runs"]
    assert set(runs) == {"untrained", "harmony", "slip"}
    assert all(runs[name]["curve"]["2"]["retrieval"] for name in ("harmony", "slip")), "equal steps, both measured"
    assert (tmp_path / "out" / "compare.md").is_file()
    assert "left_out" in report["done"]["nearest neighbours"]


@pytest.mark.parametrize("words", [["-m", "benchmarks.gpu_visit"], [str(ROOT / "benchmarks" / "gpu_visit.py")]])
def test_it_says_what_this_machine_lacks(words: list[str], tmp_path: Path):
    done = subprocess.run([sys.executable, *words, "ready"], capture_output=True, text=True, cwd=ROOT, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode == 0) == (not found["older"] and not found["missing"] and not found["broken"])
    assert "torch" in found["here"]


def test_what_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_visit, "version", lambda name: "1.0.3" if name == "timm" else "99.0")
    assert [line.split()[:2] for line in gpu_visit.ready()["older"]] == [["timm", "1.0.3,"]]


def test_without_a_gpu_nothing_full_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_visit.main(["step", f"--out={tmp_path}"]) == 2
    assert "--tiny" in capsys.readouterr().out
