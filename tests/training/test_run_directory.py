"""One process at a time writes to a run's directory, and a new run takes none that is taken."""

import os
import signal
import time
from pathlib import Path

import pytest
from processes import Processes
from runs import tiny

from harmony.errors import UserError
from harmony.training.run_directory import RunDirectory, check_free, locked, new_run, open_run


def hold(out: Path, fork: bool) -> None:
    """Keep the lock of a run until killed; with a child, as a loader's worker is, that lives on."""
    with locked(RunDirectory(out)):
        if fork and os.fork() == 0:
            time.sleep(3600)
        print("held")
        time.sleep(3600)


def test_a_new_run_has_its_recipe_and_a_lock_while_it_is_written(tmp_path: Path):
    out = tmp_path / "deep" / "run"
    with new_run(out, tiny()) as run:
        assert run.recipe() == tiny()
        assert str(os.getpid()) in (out / ".lock").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml"]
    assert open_run(out).recipe() == tiny()
    assert open_run(str(out)).latest() is None


@pytest.mark.parametrize("holds", ["recipe.yaml", "log.jsonl", "checkpoints"])
def test_a_directory_with_a_run_is_refused_and_left_alone(tmp_path: Path, holds: str):
    (tmp_path / holds).mkdir() if holds == "checkpoints" else (tmp_path / holds).write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path} already holds a run; choose another --out.*harmony resume"):
        new_run(tmp_path, tiny()).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [holds]


def test_a_directory_with_other_things_is_taken(tmp_path: Path):
    (tmp_path / "slurm.log").write_text("")
    with new_run(tmp_path, tiny()):
        pass
    assert (tmp_path / "recipe.yaml").exists()


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file; choose another --out"):
        check_free(tmp_path / "out")
    with pytest.raises(UserError, match="cannot be made"):
        new_run(tmp_path / "out" / "below", tiny()).__enter__()


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "there is no directory"), ("empty", "holds no run .it has no recipe.yaml.")]
)
def test_what_is_no_run_cannot_be_opened(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_run(tmp_path / name)


@pytest.mark.parametrize("fork", [False, True])
def test_a_directory_in_use_by_another_process_is_refused_until_that_process_dies(tmp_path: Path, fork: bool):
    run = RunDirectory(tmp_path)
    with Processes(hold, tmp_path, fork, output=tmp_path / "printed") as holder:
        holder.wait_for("held")
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on "), locked(run):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        while holder.members[0].exitcode is None:
            time.sleep(0.01)
        assert (tmp_path / ".lock").exists(), "a stale lock file remains"
        with locked(run):
            pass
        assert not (tmp_path / ".lock").exists()
        holder.finish(-signal.SIGKILL)


def test_a_process_does_not_take_a_directory_twice(tmp_path: Path):
    run = RunDirectory(tmp_path)
    with locked(run), pytest.raises(UserError, match="in use by this process"), locked(run):
        pass
    with locked(run):
        pass
