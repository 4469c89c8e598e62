"""The command line as its user meets it: what it prints, what it refuses and how, and how it leaves."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harmony import cli, recipe_files
from harmony.cli import main
from harmony.training.distributed import TrainingError
from harmony.training.signals import Interrupted

TINY = (
    "data.train=scenes:train?count=24&size=32",
    "data.val=scenes:val?count=12&size=32",
    "data.batch_size=8",
    "data.workers=0",
    "evaluation.workers=0",
    "train.steps=2",
    "train.log_every=1 step",
    "optim.warmup=1 step",
    "model.image.depth=1",
    "model.image.width=32",
    "model.image.heads=2",
    "model.text={width: 32, layers: 1, heads: 2}",
    "views.global.size=32",
    "views.local={count: 2, size: 16}",
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """What is said of a command line that must be refused; in one line, on standard error."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("harmony: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, trained and evaluated by the command line."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "quickstart", *TINY, "--out", str(out)]) == 0
    return out


def test_train_leaves_everything_in_its_directory(finished: Path) -> None:
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "step" in entry] == [1, 2]
    assert set(json.loads((finished / "metrics.json").read_text())) == {"retrieval", "zero_shot"}
    assert "<html" in (finished / "report.html").read_text()
    assert recipe_files.read(str(finished))["model"]["image"]["depth"] == 1
    assert list((finished / "checkpoints").glob("step-*/model.safetensors"))


def test_evaluate_repeats_what_train_measured(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "retrieval", "--data", "scenes:val?count=12&size=32", "--set", "workers=0"]
    assert main(["evaluate", str(finished), *arguments, "--out", str(tmp_path / "again")]) == 0
    assert "recall@1" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again == {"retrieval": json.loads((finished / "metrics.json").read_text())["retrieval"]}


def test_evaluate_measures_the_student_when_asked(finished: Path, tmp_path: Path) -> None:
    arguments = ["--task", "zero_shot", "--data", "scenes:val?count=12&size=32", "--set", "workers=0"]
    assert main(["evaluate", str(finished), *arguments, "--model", "student", "--out", str(tmp_path / "s")]) == 0
    assert "student" in (tmp_path / "s" / "evaluation" / "zero_shot.json").read_text()


def test_report_is_written_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out


# Looking


def test_recipes_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    lines = listed.splitlines()
    assert max(map(len, lines)) <= 100
    for name in recipe_files.names():
        assert sum(line.split()[:1] == [name] and line.index(name) in (0, 2) for line in lines) == 1, name
    [clip] = [line for line in lines if line.startswith("clip ")]
    assert clip.split()[-3:] == ["captions", "1.00x", "2103.00020"]


def test_a_recipe_is_shown_so_that_it_can_be_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "quickstart", "train.seed=7"]) == 0
    shown = capsys.readouterr().out
    assert "# pixels a side of a crop" in shown
    (tmp_path / "mine.yaml").write_text(shown)
    assert main(["recipes", "mine.yaml"]) == 0
    assert capsys.readouterr().out == shown


def test_cost_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["cost", "quickstart", "data.train=???", *(key for key in TINY if not key.startswith("data.train"))]) == 0
    )
    shown = capsys.readouterr().out
    for word in ("FLOPs", "text_distillation", "slow copies", "GiB"):
        assert word in shown


def test_data_is_generated_and_inspected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "generate", "scenes:train?count=6&size=32", "--out", "made"]) == 0
    assert main(["data", "index", "shards:made/train-00000.tar"]) == 0
    assert main(["data", "inspect", "shards:made/train-00000.tar", "--sheet", "sheet.png"]) == 0
    assert "6 of 6" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_writes_nothing_unasked(tmp_path: Path) -> None:
    assert main(["data", "inspect", "scenes:val?count=2&size=32"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_inspect_of_data_without_one_good_image_ends_by_saying_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("<html>")
    assert main(["data", "inspect", "folder:."]) == 2
    captured = capsys.readouterr()
    assert "good" in captured.out
    assert captured.err == "harmony: none of the 1 images looked at can be used; mend folder:. or name other data\n"


# Help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "resume", "evaluate", "recipes", "cost", "data", "report"]),
        (["train", "--help"], ["RECIPE", "KEY=VALUE", "--out"]),
        (["resume", "-h"], ["DIR", "--force"]),
        (["evaluate", "--help"], ["--task", "--data", "--model", "--set", "--out", "zero_shot"]),
        (["recipes", "--help"], ["RECIPE"]),
        (["cost", "--help"], ["RECIPE", "--caption-tokens"]),
        (["report", "--help"], ["DIR"]),
        (["data", "--help"], ["inspect", "index", "generate"]),
        (["data", "inspect", "--help"], ["URI", "--sheet"]),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown


def test_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    from harmony.evaluation.settings import TASKS

    main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    for task in TASKS:
        assert task in shown


def test_help_and_the_list_of_recipes_need_neither_torch_nor_the_network() -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from harmony.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', '--help']) == 0 and main(['recipes']) == 0\n"
        "heavy = {'torch', 'timm', 'open_clip', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("harmony 0.")


# Refusing


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "no such command 'trian'; did you mean 'train'?"),
        (["data", "inspct", "x"], "did you mean 'inspect'?"),
        (["train"], "missing argument 'RECIPE'; `harmony train --help` says how"),
        (["train", "quickstart"], "missing option '--out'"),
        (["train", "quickstart", "--ot", "x"], "--out"),
        (["train", "quickstart", "--out"], "'--out' requires an argument"),
        (["resume", "a", "b"], "unexpected extra argument"),
        (["cost", "quickstart", "--processes", "many"], "invalid value for '--processes'"),
        (["recipes", "quikstart"], "unknown recipe 'quikstart'; did you mean 'quickstart'?"),
        (["recipes", "quickstart", "optim.lrr=3"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["cost", "harmny"], "did you mean 'harmony'?"),
        (["cost", "quickstart", "--processes", "7"], "data.batch_size"),
        (["resume", "nowhere"], "there is no directory 'nowhere'"),
        (["report", "nowhere"], "nowhere"),
        (["data", "inspect", "shards:nowhere.tar"], "nowhere.tar"),
        (["data", "inspect", "sharts:x.tar"], "did you mean 'shards'?"),
        (["data", "inspect", "x.tar"], "shards:x.tar"),
        (["data", "generate", "folder:.", "--out", "y"], "folder:"),
        (["evaluate", "nowhere", "--task", "retrieval", "--data", "scenes:val?count=4", "--out", "x"], "nowhere"),
        (["evaluate", ".", "--task", "retreival", "--data", "scenes:", "--out", "x"], "did you mean 'retrieval'?"),
    ],
)
def test_wrong_command_lines(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in complaint(arguments, capsys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["epochs=3"], "did you mean 'train.epochs'?"),
        (["train.epochs"], "write key=value"),
        (["objectives.mea.weight=2"], "did you mean 'mae'?"),
        (["objectives.clip.view=globl"], "did you mean 'global'?"),
        (["model.image=vit_tyni_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
        (["train.precision=fp8"], "train.precision must be one of bf16, fp16, fp32"),
        (["train.steps=-1"], "train.steps must be at least 1"),
        (["views.global.size=36"], "not a multiple of the patch size 8"),
        (["views.local.size=4"], "smaller than one patch"),
        (["optim.warmup=3 steps"], "optim.warmup (3 steps) is longer than the run (2 steps)"),
        (["optim.warmup=2 epochs", "train.steps=3"], "optim.warmup (2 epochs) is longer than the run (3 steps"),
        (["data.train=shards:nowhere-{00000..00003}.tar"], "nowhere"),
        (["data.train=table:nowhere.csv"], "nowhere.csv"),
        (["data.train=folder:empty"], "empty"),
        (["data.val=folder:nowhere"], "nowhere"),
        (["data.val=null", "evaluation.tasks=[retrieval]"], "data.val is not given"),
        (["data.batch_size=32"], "24"),
        (["objectives.dino.mask=blok"], "blok"),
        (["objectives.ibot.head=dinno"], "dinno"),
        (["objectives.ibot=null"], "by weight=0 instead of null"),
        (["objectives.mlm=null"], "mask 'words'"),
        (["model.text=null"], "model.text is null"),
    ],
)
def test_a_run_that_cannot_work_leaves_nothing_behind(
    changes: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert told in complaint(["train", "quickstart", *TINY, *changes, "--out", "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_trained_over(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "log.jsonl").read_bytes()
    told = complaint(["train", "quickstart", *TINY, "--out", str(finished)], capsys)
    assert "already holds a run" in told
    assert (finished / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "kmeans"], "unknown task 'kmeans'"),
        (["--task", "retrieval", "--model", "techer"], "techer"),
        (["--task", "retrieval", "--set", "batchsize=3"], "did you mean 'batch_size'?"),
        (["--task", "retrieval", "--set", "batch_size=0"], "batch_size must be at least 1"),
        (["--task", "retrieval", "--set", "batch_size"], "write key=value"),
    ],
)
def test_wrong_evaluations(
    finished: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["evaluate", str(finished), "--data", "scenes:val?count=4&size=32", "--out", "out", *arguments]
    assert told in complaint(command, capsys)
    assert not (tmp_path / "out").exists()


# Leaving


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (TrainingError("the loss of dino is not finite"), 1, "the loss of dino is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower data.batch_size"),
        (OSError(errno.ENOSPC, "No space left", "/full/x"), 2, "no room on the disk at /full/x; free some"),
    ],
    ids=["not finite", "out of memory", "full disk"],
)
def test_how_it_leaves(
    raised: BaseException,
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("harmony.training.trainer.train", leave)
    assert told in complaint(["train", "quickstart", *TINY, "--out", "out"], capsys, status)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "quickstart", *TINY, "--out"],
        ["resume"],
        ["report"],
        ["data", "generate", "scenes:train?count=2", "--out"],
        ["export", "--to", "timm", "--out", "out"],
        ["cost"],
    ],
    ids=lambda command: command[0],
)
def test_a_path_that_the_system_refuses_is_named_in_one_sentence(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "cannot be used (file name too long)" in complaint([*command, str(tmp_path / ("x" * 300))], capsys)


@pytest.mark.parametrize(
    ("raised", "status"),
    [(Interrupted(15), 143), (Interrupted(2), 130), (KeyboardInterrupt(), 130)],
    ids=["SIGTERM", "Ctrl-C", "a second Ctrl-C"],
)
def test_a_stopped_run_leaves_with_its_signal(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr("harmony.training.trainer.train", leave)
    assert main(["train", "quickstart", *TINY, "--out", "out"]) == status


def test_a_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("harmony.training.trainer.train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart", *TINY, "--out", "out"])


def test_only_the_first_process_complains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "harmny", "--out", "out"]) == 2
    assert capsys.readouterr().err == ""


def test_a_card_shows_a_long_uri_whole(capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"folder:/{'long/' * 60}end"
    cli._show_card({"split": f"measured on {uri}"})
    assert uri in "".join(capsys.readouterr().out.split())
