"""What a run tells: log files, other loggers, the progress line, bad examples."""

import io
import json
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import tiny

from harmony.errors import UserError
from harmony.schedules import Clock
from harmony.training.logs import JsonLines, check_installed, cut_after, open_logs
from harmony.training.progress import ProgressLine, spoken
from harmony.training.trainer import resume, train


def test_json_lines_are_complete_at_once_and_hold_no_nan(tmp_path: Path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-6})
    text = (tmp_path / "log.jsonl").read_text()
    assert text.endswith("\n")
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-6}
    log.close()
    again = JsonLines(tmp_path / "log.jsonl")
    again.write({"step": 2})
    again.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_lines_behind_a_checkpoint_are_cut(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_after(tmp_path / "missing.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("harmony.training.logs.find_spec", lambda package: None)
    with pytest.raises(
        UserError, match=rf"asks for {name}, which is not installed; run `pip install 'harmony\[{name}\]'`"
    ):
        check_installed([name])
    check_installed([])


def test_other_loggers_get_every_value_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both packages are optional, so stand-ins with the few calls that are used take their place."""
    calls: list[tuple] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int) -> None:
            calls.append(("tensorboard", directory, purge_step))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            calls.append((key, value, step))

        def close(self) -> None:
            calls.append(("closed",))

    class Run:
        def log(self, values: dict, step: int) -> None:
            calls.append(("wandb", values, step))

        def finish(self) -> None:
            calls.append(("finished",))

    def init(**settings) -> Run:
        calls.append(("init", settings["id"], settings["resume"], settings["config"]))
        return Run()

    tensorboard, wandb = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init = SummaryWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logs = open_logs(tmp_path, ["tensorboard", "wandb"], {"name": "x"}, step=4)
    for log in logs:
        log.write({"step": 5, "loss": 2.0})
        log.close()
    assert calls == [
        ("tensorboard", str(tmp_path / "tensorboard"), 5),
        ("init", tmp_path.name, "allow", {"name": "x"}),
        ("loss", 2.0, 5),
        ("closed",),
        ("wandb", {"step": 5, "loss": 2.0}, 5),
        ("finished",),
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 5, "loss": 2.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (45.4, "45 s"), (59.9, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)
def test_durations_are_spoken(seconds: float, words: str):
    assert spoken(seconds) == words


def test_a_plain_line_tells_how_far_and_how_fast(capsys: pytest.CaptureFixture[str]):
    with ProgressLine(Clock(0, 10, 4), batch_size=8) as progress:
        for step in range(1, 11):
            progress.update(Clock(step, 10, 4), loss=2.5, waiting=0.3 if step == 10 else 0.01)
        progress.say("a message of its own")
    first, last, message = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/10 · loss 2.5000 · 0 s left · ")
    assert first.endswith("pairs/s · epoch 0.25")
    assert last.startswith("step 10/10 · loss 2.5000 · done · ")
    assert last.endswith("epoch 2.50 · 30% waiting for data")
    assert message == "a message of its own"


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressLine(Clock(2, 10, 4), batch_size=8) as progress:
        progress.update(Clock(5, 10, 4), loss=2.5, waiting=0.0)
        progress.say("a message of its own")
    shown = capsys.readouterr().err
    assert "\x1b[" in shown
    assert "━" in shown
    assert " 50%" in shown
    assert "step 5/10" in shown
    assert "left" in shown
    assert "a message of its own" in shown


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]):
    with ProgressLine(Clock(0, 1, 1), batch_size=8, shown=False) as progress:
        progress.update(Clock(1, 1, 1), loss=1.0, waiting=0.5)
        progress.say("nothing")
    assert capsys.readouterr().err == ""


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """40 pairs in a shard, of which two images are cut off."""
    path = tmp_path / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            file = io.BytesIO()
            noise = torch.randint(256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            Image.fromarray(noise.numpy()).save(file, "png")
            image = file.getvalue()[: 300 if i in (3, 30) else None]
            for name, data in ((f"{i:03}.png", image), (f"{i:03}.txt", f"picture number {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_bad_examples_are_written_down_once_with_step_key_and_reason(shard: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(tiny(f"data.train=shards:{shard}", "train.steps=5", "data.max_bad_share=0.2", "data.workers=1"), out)
    records = [json.loads(line) for line in (out / "bad_examples.jsonl").read_text().splitlines()]
    assert sorted(record["key"] for record in records) == ["003", "030"]
    assert all(record["reason"] and 1 <= record["step"] <= 5 for record in records)
    import shutil

    shutil.rmtree(out / "checkpoints" / "step-00000005")
    resume(out)
    again = [json.loads(line) for line in (out / "bad_examples.jsonl").read_text().splitlines()]
    assert again == records


def test_too_many_bad_examples_stop_the_run(shard: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"data.max_bad_share=0.01"):
        train(tiny(f"data.train=shards:{shard}", "train.steps=5", "data.max_bad_share=0.01"), tmp_path / "run")
