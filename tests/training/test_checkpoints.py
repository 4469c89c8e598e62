"""Checkpoints are complete or not there, whatever happens while they are written."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Processes
from safetensors import SafetensorError

from harmony.errors import UserError
from harmony.training import checkpoints
from harmony.training.checkpoints import State

MODEL = {"student.weight": torch.arange(12.0).view(3, 4).T, "objectives.clip.logit_scale": torch.tensor(2.5)}
TRAINING = {
    "optimiser": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    "scaler": {},
}


def _save(directory: Path, step: int, keep: int = 3) -> Path:
    state = State(step=step, steps=100, epoch_steps=10, examples=step * 8, skipped=1, data={"examples": 80})
    return checkpoints.save(directory, MODEL, TRAINING, state, "name: x\n", keep)


def test_what_is_saved_is_read_back(tmp_path: Path):
    path = _save(tmp_path / "checkpoints", 12)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "recipe.yaml", "state.json", "training.pt"]
    state = checkpoints.read_state(path)
    assert (state.step, state.epoch, state.examples, state.skipped) == (12, 1.2, 96, 1)
    assert state.torch == torch.__version__
    model = checkpoints.read_model(path)
    assert model.keys() == MODEL.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in MODEL.items())
    training = checkpoints.read_training(path)
    assert torch.equal(training["optimiser"]["state"][0]["exp_avg"], torch.ones(2))
    assert training["optimiser"]["param_groups"] == [{"lr": 0.1}]
    assert (path / "recipe.yaml").read_text() == "name: x\n"
    assert (path / "model.safetensors").stat().st_mode == (path / "state.json").stat().st_mode


def test_the_last_few_are_kept(tmp_path: Path):
    for step in (3, 12, 20, 101):
        _save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints.every(tmp_path)] == ["step-00000020", "step-00000101"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_step_is_saved_once(tmp_path: Path):
    path = _save(tmp_path, 3)
    before = (path / "state.json").stat().st_mtime_ns
    assert _save(tmp_path, 3) == path
    assert (path / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "state.json", "recipe.yaml"])
def test_no_room_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    """Each file in turn goes to a device that is always full, through the writers that are really used."""
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    good = _save(directory, 1, keep=1)
    write = checkpoints._write

    def full(path: Path, content) -> None:
        if path.name == file == "model.safetensors":  # it replaces what is there, so it is given the words it would say
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        if path.name == file:
            path.symlink_to("/dev/full")
        write(path, content)

    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(
        UserError, match=rf"no room to save a checkpoint .* takes 1.0 MiB.*harmony resume {tmp_path}/run"
    ):
        _save(directory, 2, keep=1)
    assert list(directory.iterdir()) == [good]
    monkeypatch.undo()
    assert checkpoints.read_state(good).step == 1
    assert _save(directory, 2, keep=1).is_dir()


def test_a_disk_with_too_little_room_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = _save(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "_free", lambda directory: 1000)
    monkeypatch.setattr(checkpoints, "_write", lambda path, content: pytest.fail("wrote something"))
    with pytest.raises(UserError, match=r"takes 1.0 MiB, and 0.0 MiB are free"):
        _save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [good]


def test_another_error_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(path: Path, content) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "_write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        _save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def _write_for_ever(directory: Path) -> None:
    def slow(model, path: Path) -> None:
        path.write_bytes(b"half")
        print("writing")
        time.sleep(3600)

    checkpoints.safetensors.torch.save_file = slow
    _save(directory, 2)


def test_what_a_killed_process_left_is_ignored_and_swept(tmp_path: Path):
    directory = tmp_path / "checkpoints"
    good = _save(directory, 1)
    with Processes(_write_for_ever, directory, output=tmp_path / "printed") as writer:
        writer.wait_for("writing")
        os.kill(writer.pid, signal.SIGKILL)
        writer.finish(-signal.SIGKILL)
    (left,) = [path for path in directory.iterdir() if path != good]
    assert left.name.startswith(".aside-")
    assert checkpoints.every(directory) == [good]
    _save(directory, 2)
    assert not left.exists()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("model.safetensors", checkpoints.read_model),
        ("training.pt", checkpoints.read_training),
        ("state.json", checkpoints.read_state),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, read):
    path = _save(tmp_path, 1)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{file} cannot be read .*; remove the directory {path}"):
        read(path)


def test_a_checkpoint_holding_code_is_not_executed(tmp_path: Path):
    path = _save(tmp_path, 1)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"optimiser": Trap()}, path / "training.pt")
    with pytest.raises(UserError, match=r"cannot be read .it is damaged, or holds more than tensors.; remove") as told:
        checkpoints.read_training(path)
    assert "weights_only" not in str(told.value)
    assert not (tmp_path / "sprung").exists()


def test_another_format_is_refused(tmp_path: Path):
    path = _save(tmp_path, 1)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | {"format": 99, "harmony": "9.0"}))
    with pytest.raises(
        UserError, match=r"written by harmony 9\.0 in checkpoint format 99, but this version reads format 1"
    ):
        checkpoints.read_state(path)


def test_a_full_disk_elsewhere_in_the_run_is_explained(tmp_path: Path):
    with (
        pytest.raises(UserError, match=f"no room on the disk of {tmp_path}.*harmony resume {tmp_path}"),
        checkpoints.full_disk_explained(tmp_path / "checkpoints"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("a line of the log")
