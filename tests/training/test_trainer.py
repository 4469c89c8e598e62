"""Whole runs: what they write, going on after a stop, and what they refuse."""

import io
import json
import os
import re
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import Processes
from runs import MEASURED_BY_THE_CLOCK, log_of, tiny

from harmony.errors import UserError
from harmony.training import checkpoints
from harmony.training.diagnostics import TrainingError
from harmony.training.learner import Learner
from harmony.training.run_directory import open_run
from harmony.training.step import Stepper
from harmony.training.trainer import resume, train


@contextmanager
def in_the_fifth_step(act: Callable[[], object]) -> Iterator[None]:
    """Do something at the beginning of step 5."""
    step = Stepper.step

    def acting(self, loaded, clock, logged):
        if clock.step == 4:
            act()
        return step(self, loaded, clock, logged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", acting)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(), out) == out
    return out


def test_a_run_writes_recipe_log_and_the_last_checkpoints(whole: Path):
    assert sorted(path.name for path in whole.iterdir()) == ["checkpoints", "log.jsonl", "recipe.yaml"]
    run = open_run(whole)
    assert run.recipe() == tiny()
    assert [path.name for path in checkpoints.every(run.checkpoints)] == [
        "step-00000003",
        "step-00000006",
        "step-00000008",
    ]
    state = checkpoints.read_state(run.latest())
    assert (state.step, state.steps, state.epoch_steps, state.examples) == (8, 8, 5, 64)
    assert state.data["examples"] == 40
    assert state.recipe == tiny().fingerprint()


def test_every_logged_step_says_all_there_is_to_say(whole: Path):
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    losses = ["clip", "dino", "ibot", "mae", "mlm", "text_distillation"]
    parts = ["image", "text", "clip", "dino", "mae", "mlm", "text_distillation"]
    wanted = {"step", "epoch", "examples", "loss", "lr", "weight_decay", "teacher_momentum", "grad_norm", "temperature"}
    wanted |= {"skipped_steps", *MEASURED_BY_THE_CLOCK}
    wanted |= {f"{kind}/{name}" for kind in ("loss", "weight") for name in losses}
    wanted |= {f"grad_norm/{part}" for part in parts}
    wanted |= {
        f"sign/{name}/{sign}"
        for name in ("dino", "ibot", "text_distillation")
        for sign in ("target_entropy", "prototype_use", "teacher_student_kl")
    }
    wanted |= {
        f"sign/{model}_{tower}/{sign}"
        for model in ("student", "teacher")
        for tower in ("image", "text")
        for sign in ("rank", "std")
    }
    for line in lines:
        assert wanted <= line.keys()
        assert all(isinstance(value, (int, float)) for value in line.values())
        assert line["loss"] == pytest.approx(sum(line[f"weight/{name}"] * line[f"loss/{name}"] for name in losses))
        assert line["grad_norm"] == pytest.approx(sum(line[f"grad_norm/{part}"] ** 2 for part in parts) ** 0.5)
        assert line["examples"] == 8 * line["step"]
        assert line["epoch"] == line["step"] / 5
        assert 0 <= line["data_wait"] <= 1
        assert line["examples_per_second"] > 0
        assert 1 <= line["sign/student_image/rank"] <= 8
    assert lines[0]["temperature"] == pytest.approx(0.07)


def _train_signalled(out: Path, number: int) -> None:
    """The signal goes to the whole process group, so to the loader's workers, too."""
    with in_the_fifth_step(lambda: os.killpg(0, number)):
        train(tiny("data.workers=2"), out)


@pytest.mark.parametrize(
    ("number", "status", "saved"),
    [(signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 5), (signal.SIGKILL, -signal.SIGKILL, 3)],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, status: int, saved: int
):
    """Bit for bit: every number of the log, every weight, the optimiser."""
    out = tmp_path / "run"
    printed = Processes(_train_signalled, out, number, output=tmp_path / "printed").finish(status)
    run = open_run(out)
    assert checkpoints.read_state(run.latest()).step == saved
    if number != signal.SIGKILL:
        assert f"Stopped and saved at step 5; go on with `harmony resume {out}`" in printed
        assert "Traceback" not in printed
        assert not (out / ".lock").exists()
    resume(out)
    assert f"steps {saved + 1} to 8 of 8 examples, fp32 on cpu, in {out}" in capfd.readouterr().err
    assert log_of(out) == log_of(whole)
    ours, theirs = (checkpoints.read_model(open_run(run).latest()) for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (checkpoints.read_training(open_run(run).latest()) for run in (out, whole))
    for index, state in theirs["optimiser"]["state"].items():
        assert all(torch.equal(ours["optimiser"]["state"][index][key], value) for key, value in state.items())


def _save_for_ever(out: Path) -> None:
    def save(*arguments, **named) -> None:
        print("saving")
        time.sleep(3600)

    checkpoints.save = save
    with in_the_fifth_step(lambda: os.killpg(0, signal.SIGINT)):
        train(tiny("train.checkpoint_every=100 steps"), out)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path):
    with Processes(_save_for_ever, tmp_path / "run", output=tmp_path / "printed") as process:
        process.wait_for("saving")
        os.killpg(process.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in process.finish(1)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    tiny().save(out / "recipe.yaml")
    (out / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    resume(out)
    assert log_of(out) == log_of(whole)


def test_a_finished_run_has_nothing_left_to_do(whole: Path, tmp_path: Path):
    before = log_of(whole)
    assert resume(whole) == whole
    assert log_of(whole) == before


def test_precision_and_accumulation_resume_too(tmp_path: Path):
    settings = ["train.precision=fp16", "train.accumulate=2", "train.steps=6", "train.checkpoint_every=2 steps"]
    train(tiny(*settings), tmp_path / "whole")
    train(tiny(*settings), tmp_path / "part")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-0000000{step}")
    resume(tmp_path / "part")
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    scales = [line["loss_scale"] for line in log_of(tmp_path / "whole")]
    assert scales[0] == 2.0**16


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run that ends with its second checkpoint."""
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    return out


def _edit(path: Path, key: str, value: object) -> None:
    values = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    *sections, last = key.split(".")
    here = values
    for section in sections:
        here = here[section]
    here[last] = value
    path.write_text(yaml.safe_dump(values) if path.suffix == ".yaml" else json.dumps(values))


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("recipe.yaml", "optim.lr", 0.01, r"optim.lr in recipe.yaml was 0.03 and is 0.01"),
        ("recipe.yaml", "objectives.mae.weight", 3, r"objectives.mae.weight in recipe.yaml was 1.0 and is 3.0"),
        ("recipe.yaml", "data.train", "scenes:train?count=48", r"data at scenes:.* had 40 examples and has 48"),
        ("recipe.yaml", "data.train", "scenes:train?count=40&seed=5", r"data at .* changed .still 40 examples"),
        ("checkpoints/step-00000006/state.json", "torch", "1.13.1", r"torch was 1.13 and is \d"),
        ("checkpoints/step-00000006/state.json", "timm", "0.4.12", r"timm was 0.4 and is \d"),
        ("checkpoints/step-00000006/state.json", "open_clip", "1.3.0", r"open_clip was 1.3 and is \d"),
    ],
)
def test_resume_names_what_differs_unless_forced(copied: Path, file: str, key: str, value: object, message: str):
    _edit(copied / file, key, value)
    before = (copied / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"cannot go on as it began: .*{message}.*put this back, or add --force"):
        resume(copied)
    assert (copied / "log.jsonl").read_bytes() == before
    assert not (copied / ".lock").exists()
    resume(copied, force=True)
    assert [line["step"] for line in log_of(copied)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.keep", 7), ("train.log_every", "2 steps"), ("efficiency.backward", "joint"), ("data.workers", 1)],
)
def test_resume_accepts_what_changes_no_result(copied: Path, key: str, value: object):
    _edit(copied / "recipe.yaml", key, value)
    resume(copied)
    assert open_run(copied).latest().name == "step-00000008"


def test_another_model_is_named_even_when_forced(copied: Path):
    _edit(copied / "recipe.yaml", "model.image.width", 32)
    with pytest.raises(
        UserError, match=r"of shape .* where the recipe wants .*; use the recipe that it was saved with"
    ):
        resume(copied, force=True)
    _edit(copied / "recipe.yaml", "model.image.width", 16)
    values = yaml.safe_load((copied / "recipe.yaml").read_text())
    del values["objectives"]["mae"]
    (copied / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"holds, unlike the recipe, \d+ tensors, such as objectives.mae"):
        resume(copied, force=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=64", "batch_size is 64, but scenes:train.count=40 has only 40 examples"),
        ("data.train=shards:/nowhere/x.tar", "nowhere"),
        ("optim.warmup=3 epochs", "warmup"),
        ("train.accumulate=3", "accumulate=3"),
        ("train.loggers=wandb", r"asks for wandb, which is not installed; run `pip install 'harmony\[wandb\]'`"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError, match=message):
        train(tiny(override), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_checkpoint_ends_the_run_with_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = checkpoints._free
    monkeypatch.setattr(checkpoints, "_free", lambda d: 10 if list(d.glob("step-*")) else free(d))
    with pytest.raises(UserError, match="no room to save a checkpoint"):
        train(tiny(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 9))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Makes the loss of mae NaN in the given steps (counted from 0)."""

    def poison(*steps: int) -> None:
        losses_by_group = Learner.losses_by_group

        def spoiled(self, batch, clock, logged=False):
            for group in losses_by_group(self, batch, clock, logged):
                if "mae" in group.losses and clock.step in steps:
                    group.losses["mae"] = group.losses["mae"] * torch.nan
                yield group

        monkeypatch.setattr(Learner, "losses_by_group", spoiled)

    return poison


def test_two_steps_that_are_not_finite_are_skipped(tmp_path: Path, poisoned, capfd: pytest.CaptureFixture[str]):
    poisoned(2, 3, 6)
    train(tiny(), tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert [line["loss/mae"] is None for line in lines] == [step in (2, 3, 6) for step in range(8)]
    told = capfd.readouterr().err
    assert "step 3: the loss of mae is not finite, with examples" in told
    assert "its update is left out" in told
    assert len(list((tmp_path / "run" / "not_finite").iterdir())) == 3


def test_a_third_one_in_a_row_stops_the_run_and_names_objective_step_and_examples(tmp_path: Path, poisoned):
    poisoned(4, 5, 6)
    with pytest.raises(
        TrainingError, match=r"stopped at step 7: the loss of mae is not finite, with examples"
    ) as error:
        train(tiny(), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert checkpoints.read_state(run.latest()).step == 6, "the last good checkpoint"
    path = re.search(r"saved in (\S+)\)", str(error.value))[1]
    (batch,) = torch.load(path, weights_only=True)
    assert batch["images"]["global"].shape == (2, 8, 3, 32, 32)
    assert len(batch["keys"]) == 8
    assert all(key in str(error.value) for key in batch["keys"])
    assert batch["chance"]["keys"].shape == (8,)
    assert set(batch["masks"]) == {"block", "mae", "words"}
    assert batch["captions"]["caption"].shape[0] == 8


def test_a_resumed_run_counts_what_was_skipped_before(tmp_path: Path, poisoned):
    poisoned(1)
    train(tiny("train.steps=8"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    resume(tmp_path / "run")
    assert [line["skipped_steps"] for line in log_of(tmp_path / "run")] == [0, 1, 1, 1, 1, 1, 1, 1]


def _shards(folder: Path, good: int, bad: int) -> str:
    """A tar of captioned pictures, of which the last are no pictures."""
    folder.mkdir()
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(good + bad):
            picture = io.BytesIO()
            Image.new("RGB", (40, 40), (number, 99, 99)).save(picture, "JPEG")
            content = picture.getvalue() if number < good else b"<html>not found</html>"
            for name, data in ((f"{number:04}.jpg", content), (f"{number:04}.txt", b"a plain square")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return f"shards:{folder}/pairs.tar"


@pytest.mark.parametrize(("good", "bad"), [(20, 12), (0, 32)])
def test_data_that_is_too_bad_stops_the_run_and_leaves_the_list(tmp_path: Path, good: int, bad: int):
    recipe = tiny(f"data.train={_shards(tmp_path / 'data', good, bad)}", "data.max_bad_share=0.1")
    with pytest.raises(UserError, match="bad"):
        train(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_examples.jsonl").read_text().splitlines()]
    assert records and {record["key"] for record in records} <= {f"{n:04}" for n in range(good, good + bad)}
    assert all(record["reason"] for record in records)


def test_a_disk_without_room_for_one_checkpoint_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"takes \d.* free; make room or choose another --out"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parts_of_one_image_are_refused_where_images_are_compared(tmp_path: Path):
    with pytest.raises(UserError, match=r"objective clip compares images .* lower train.accumulate"):
        train(tiny("data.batch_size=4", "train.accumulate=4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
