"""Whole comparisons: what they leave, that interruptions change nothing, and what they refuse."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
from browser import CHROMIUM, opened, parsed
from comparisons import IMAGES, ROWS, SHARED, comparison, row
from PIL import Image
from processes import Processes
from safetensors.torch import save_file

from harmony import evaluation
from harmony import recipe as recipes
from harmony.cli import main
from harmony.comparison import compare, seeds_of
from harmony.comparison.runs import Runs
from harmony.errors import UserError
from harmony.training.distributed import TrainingError
from harmony.training.learner import build_learner
from harmony.training.signals import Interrupted
from harmony.training.step import Stepper
from harmony.training.trained import drawn_towers

KNN = "knn/top1@20"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, each_recipe_is_counted_once):
    """A comparison as the command makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        assert main(["compare", *ROWS, *SHARED, "--seeds", "0,1", "--out", "cmp"]) == 0
        return Path("cmp").resolve()


@pytest.fixture(scope="module")
def found(finished):
    return comparison(finished)


def test_mean_and_spread_are_those_of_the_runs(finished, found):
    for name in ("untrained", "clip-small", "images"):
        files = [finished / "runs" / name / f"seed-{seed}" / "metrics.json" for seed in (0, 1)]
        metrics = [json.loads(file.read_text()) for file in files]
        for column in found["columns"]:
            cell = row(found, name)["cells"][column["key"]]
            if "mean" in cell:
                values = [one[column["task"]][column["metric"]] for one in metrics]
                assert cell["values"] == values
                assert cell["mean"] == pytest.approx(np.mean(values))
                assert cell["spread"] == pytest.approx(np.std(values, ddof=1))


def test_rows_of_images_alone_have_no_value_where_texts_are_needed(found):
    tasks = {column["key"]: column["task"] for column in found["columns"]}
    assert list(dict.fromkeys(tasks.values())) == ["knn", "linear", "zero_shot", "retrieval"]
    for key, cell in row(found, "images")["cells"].items():
        assert ("mean" in cell) == (tasks[key] in ("knn", "linear"))
        assert "mean" in cell or "needs a text tower" in cell["missing"]
    for name in ("untrained", "clip-small"):
        assert all("mean" in cell for cell in row(found, name)["cells"].values())


def test_every_column_marks_its_best(found):
    for column in found["columns"]:
        cells = [one["cells"][column["key"]] for one in found["rows"]]
        top = max(cell["mean"] for cell in cells if "mean" in cell)
        assert all(
            cell["best"] == (round(100 * cell["mean"], 1) == round(100 * top, 1)) for cell in cells if "mean" in cell
        )


def test_all_saw_as_many_examples_and_curves_say_what_that_cost(found):
    assert (found["steps"], found["batch_size"], found["examples"]) == (4, 8, 32)
    for name in ("clip-small", "images"):
        one = row(found, name)
        for run in one["runs"].values():
            assert [point["step"] for point in run["curve"]] == [2, 4]
            assert [point["examples"] for point in run["curve"]] == [16, 32]
            assert [point["flops"] for point in run["curve"]] == [16 * one["flops_a_pair"], 32 * one["flops_a_pair"]]
            assert "linear" not in run["curve"][0]["metrics"]
            assert set(run["curve"][1]["metrics"]) == set(run["metrics"])
    assert row(found, "images")["flops_a_pair"] > row(found, "clip-small")["flops_a_pair"]


def test_a_run_is_that_of_harmony_train(finished):
    taken = recipes.load(finished / "runs" / "clip-small" / "seed-1")
    plain = recipes.load("clip-small", [*SHARED[:5], *SHARED[7:], "train.seed=1"])
    assert taken.fingerprint() == plain.fingerprint()
    assert [path.name for path in (finished / "runs" / "clip-small" / "seed-1" / "checkpoints").iterdir()] == [
        "step-00000004"
    ]


def test_a_value_is_that_of_harmony_evaluate(finished, found):
    run = finished / "runs" / "images" / "seed-0"
    assert row(found, "images")["copy"] == "teacher"
    assert row(found, "clip-small")["copy"] == "student"  # none of its objectives asks a teacher
    uris = ("scenes:held_out?count=24&size=32", "scenes:train?count=48&size=32")
    again = evaluation.run(str(run), "knn", *uris, settings={"workers": 0})
    assert row(found, "images")["runs"]["0"]["metrics"]["knn"] == again


def test_every_row_begins_as_the_untrained_model():
    texts, images = (
        recipes.load("clip-small", [*SHARED[:5], *SHARED[7:]]),
        recipes.load("quickstart", [*IMAGES.split()[2:], *SHARED[:1], *SHARED[2:]]),
    )
    drawn = drawn_towers(texts).image.state_dict()
    for recipe in (texts, images):
        import torch

        torch.manual_seed(recipe.train.seed)
        begun = build_learner(recipe).student.image.state_dict()
        assert all(torch.equal(begun[name], value) for name, value in drawn.items())


def test_no_features_are_left(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "compare.html", "compare.json", "compare.md", "plan.json", "runs",
    ]  # fmt: skip


def test_the_page_opens_and_needs_nothing(finished, tmp_path):
    seen = opened(finished / "compare.html", tmp_path)
    assert seen.errors == []
    assert seen.headings == ["Table", "Over examples seen", "Over compute", "Every run", "Equal terms"]
    assert len(seen.named("svg")) == 2 * 4  # knn, zero-shot and both directions of retrieval
    anchors = {attributes["id"] for attributes in seen.named("section")}
    assert {link["href"] for link in seen.named("a")} == {f"#{anchor}" for anchor in anchors}
    assert not seen.named("img", "link", "iframe", "object", "base")
    page = (finished / "compare.html").read_text()
    assert "url(" not in page
    assert parsed(page).errors == []
    assert "clip-small" in seen.text
    assert "n/a" in seen.text
    assert "left out: it has no text tower" in seen.text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: only a browser runs the page's script")
def test_charts_over_compute_say_where_each_value_stands(finished, tmp_path):
    page = (finished / "compare.html").read_text(encoding="utf-8")
    hover = """<script>
      for (const name of ["examples", "compute"]) {
        const chart = document.querySelector("#" + name + " svg"), box = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 8, clientY: box.top + 40 }));
      }
    </script>"""
    (tmp_path / "hover.html").write_text(page.replace("</body>", hover + "</body>"), encoding="utf-8")
    seen = opened(tmp_path / "hover.html", tmp_path)
    assert seen.errors == []
    assert len(seen.of_class("tip")) == 2
    assert "32 examples" in seen.text
    assert "clip-small, " in seen.text


# Interruptions


def test_an_interrupted_comparison_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ([*ROWS, *SHARED], "cmp", [0, 1])

    from harmony.comparison import runs

    measure, calls = runs.measure, 0

    def stopped(*arguments):
        nonlocal calls
        calls += 1
        if calls in (3, 16):  # of the untrained model, and of a checkpoint
            raise KeyboardInterrupt
        return measure(*arguments)

    step = Stepper.step

    def terminated(self, loaded, clock, logged):
        if clock.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, loaded, clock, logged)

    monkeypatch.setattr(runs, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(*command)
    assert not (tmp_path / "cmp" / "runs" / "clip-small").exists()
    monkeypatch.setattr(Stepper, "step", terminated)
    with pytest.raises(Interrupted):
        compare(*command)
    checkpoints = tmp_path / "cmp" / "runs" / "clip-small" / "seed-0" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000002", "step-00000003"]
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(KeyboardInterrupt):
        compare(*command)
    assert not (tmp_path / "cmp" / "compare.json").exists()
    calls = 100
    compare(*command)
    for name in ("compare.json", "compare.md"):
        ours, theirs = ((folder / name).read_text() for folder in (tmp_path / "cmp", finished))
        assert ours == theirs
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000004"]


def test_a_finished_comparison_is_not_done_again(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "cmp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cmp" / "compare.json").unlink()

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr("harmony.comparison.runs.measure", never)
    monkeypatch.setattr(Stepper, "step", never)
    compare([*ROWS, *SHARED], "cmp", [0, 1])
    assert comparison("cmp") == comparison(finished)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "more", "told"),
    [
        ([*ROWS, *SHARED, "optim.lr=0.5"], {}, "optim.lr of clip-small was 0.006, and now it is 0.5"),
        ([*ROWS, *SHARED], {"seeds": [0, 2]}, "--seeds was 0, 1, and now it is 0, 2"),
        ([*ROWS, *SHARED], {"tasks": ["knn"]}, "--tasks was knn, linear, zero_shot, retrieval, and now it is knn"),
        ([*ROWS, *SHARED, "evaluation.knn.temperature=1.0"], {}, "evaluation.knn.temperature was 0.07"),
        ([*ROWS, *SHARED, "data.val=scenes:held_out?count=25&size=32"], {}, "the data measured on was"),
        ([*ROWS, *SHARED, "train.checkpoint_every=1 step"], {}, "train.checkpoint_every was 2 steps"),
    ],
)
def test_other_settings_are_refused_by_name(arguments, more, told, finished):
    before = contents(finished)
    with pytest.raises(UserError) as error:
        compare(arguments, finished, **({"seeds": [0, 1]} | more))
    assert told in str(error.value)
    assert "choose another --out" in str(error.value)
    assert contents(finished) == before


def test_weights_that_were_given_are_known_by_what_they_are(tmp_path):
    """A file that was written anew under the same name is another start; copies of it are the same one."""
    shape = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", **shape).state_dict(), file)
    asked = [ROWS[0], f"{ROWS[0]} name=again", *SHARED, f"model.init={{image: '{file}'}}"]
    asked = [word for word in asked if "local" not in word and "dino" not in word]
    compare(asked, tmp_path / "cmp", [0], ["knn"])
    file.write_bytes(file.read_bytes())
    compare(asked, tmp_path / "cmp", [0], ["knn"])
    save_file(timm.create_model("vit_tiny_patch16_224", **shape).state_dict(), file)
    with pytest.raises(UserError, match=r"the weights of model\.init\.image of clip-small was \w{32}, and now it is"):
        compare(asked, tmp_path / "cmp", [0], ["knn"])


def test_settings_that_change_no_result_may_change(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "cmp")
    changed = [*ROWS, *SHARED, "data.max_bad_share=0.5", "train.log_every=3 steps", "evaluation.workers=1"]
    compare(changed, tmp_path / "cmp", [0, 1])
    assert comparison(tmp_path / "cmp")["rows"][0] == comparison(finished)["rows"][0]


def test_a_run_that_stopped_for_bad_examples_goes_on_once_more_of_them_are_allowed(tmp_path):
    for number in range(16):
        Image.new("RGB", (40, 40), (16 * number, 0, 0)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"red {number}")
    (tmp_path / "03.png").write_bytes(b"damaged")
    pairs = [f"data.train=folder:{tmp_path}", f"data.val=folder:{tmp_path}", "data.workers=0"]
    shared = [word for word in SHARED if "local" not in word and "dino" not in word]
    asked = [ROWS[0], f"{ROWS[0]} name=again", *shared, *pairs]
    with pytest.raises(UserError, match=r"data.max_bad_share=0.01 allows"):
        compare([*asked, "data.max_bad_share=0.01"], tmp_path / "cmp", [0], ["retrieval"])
    assert (tmp_path / "cmp" / "runs" / "clip-small" / "seed-0" / "recipe.yaml").is_file(), "it had begun"
    compare([*asked, "data.max_bad_share=0.5"], tmp_path / "cmp", [0], ["retrieval"])
    assert len(comparison(tmp_path / "cmp")["rows"]) == 3


def test_more_seeds_are_added_to_what_there_is(tmp_path, monkeypatch):
    compare([*ROWS, *SHARED], tmp_path / "cmp", [1], ["knn"])
    trained = []
    train = Runs._train
    monkeypatch.setattr(
        Runs, "_train", lambda self, entry, seed, run: trained.append(seed) or train(self, entry, seed, run)
    )
    compare([*ROWS, *SHARED], tmp_path / "cmp", [0, 1], ["knn"])
    assert trained == [0, 0]
    compare([*ROWS, *SHARED], tmp_path / "both", [0, 1], ["knn"])
    assert comparison(tmp_path / "cmp")["rows"] == comparison(tmp_path / "both")["rows"]
    path = tmp_path / "cmp" / "runs" / "clip-small" / "seed-1" / "measured.json"
    values = json.loads(path.read_text())
    assert values["software"] == comparison(tmp_path / "cmp")["versions"]
    path.write_text(json.dumps(values | {"software": {"torch": "1.0"}}))
    compare([*ROWS, *SHARED], tmp_path / "cmp", [0, 1], ["knn"])
    assert comparison(tmp_path / "cmp")["versions"]["torch"] == f"1.0 and {values['software']['torch']}"
    with pytest.raises(UserError, match="--seeds was 0, 1, and now it is 1"):
        compare([*ROWS, *SHARED], tmp_path / "cmp", [1], ["knn"])


def measured_by_knn(out):
    compare([*ROWS, *SHARED], out, [0], ["knn"])


def test_two_processes_leave_what_one_leaves(tmp_path):
    measured_by_knn(tmp_path / "one")
    Processes(measured_by_knn, tmp_path / "two", ranks=2, output=tmp_path / "printed").finish()
    one, two = comparison(tmp_path / "one"), comparison(tmp_path / "two")
    assert [column["key"] for column in one["columns"]] == [column["key"] for column in two["columns"]]
    for ours, theirs in zip(one["rows"], two["rows"], strict=True):
        for mine, other in zip(ours["runs"]["0"]["curve"], theirs["runs"]["0"]["curve"], strict=True):
            assert mine["step"] == other["step"]
            for task, metrics in mine["metrics"].items():
                assert metrics == pytest.approx(other["metrics"][task], abs=0.05)  # one image of 24
    assert (tmp_path / "two" / "compare.html").is_file()


# Failures


def test_a_row_whose_numbers_are_not_finite_is_noted_and_the_others_go_on(tmp_path, monkeypatch):
    step = Stepper.step

    def fails(self, loaded, clock, logged):
        if "dino" in self._recipe_objectives and clock.step == 1:
            raise TrainingError("the loss of dino is not finite")
        return step(self, loaded, clock, logged)

    make = Stepper.__init__

    def made(self, learner, recipe, device):
        make(self, learner, recipe, device)
        self._recipe_objectives = set(recipe.objectives)

    monkeypatch.setattr(Stepper, "__init__", made)
    monkeypatch.setattr(Stepper, "step", fails)
    compare([IMAGES, "clip-small", *SHARED], tmp_path / "cmp", [0], ["knn"])
    found = comparison(tmp_path / "cmp")
    assert row(found, "images")["cells"][KNN] == {"missing": "failed"}
    assert row(found, "images")["runs"]["0"]["failed"] == "the loss of dino is not finite"
    assert "mean" in row(found, "clip-small")["cells"][KNN]
    assert "| failed |" in (tmp_path / "cmp" / "compare.md").read_text()
    assert "the loss of dino is not finite" in parsed((tmp_path / "cmp" / "compare.html").read_text()).text


# What is refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["clip-small"], "two recipes or more"),
        ([*ROWS, "--seeds", "0,x"], "--seeds '0,x' is not a list"),
        ([*ROWS, "--seeds", "1,1"], "--seeds names 1 twice"),
        ([*ROWS, "--tasks", "kmeans"], "unknown task 'kmeans'"),
        ([*ROWS, "--tasks", "knn,linear,knn"], "--tasks names knn twice"),
        ([IMAGES, f"{IMAGES} name=other", *SHARED[2:], "--tasks", "retrieval"], "no row can do retrieval"),
        ([*ROWS, *SHARED[2:], "--tasks", "retrieval"], "the row 'images' can be measured by none"),
        ([*ROWS, "data.val=null"], "no data to measure on"),
        ([*ROWS, "--data", "scenes:nothing?x=1"], "scenes:"),
        ([*ROWS, "data.batch_size=49"], "the row 'clip-small': data.batch_size is 49"),
        ([*ROWS, "optim.warmup=3 epochs"], "longer than the run"),
        ([*ROWS, "evaluation.knn={ks: [1000], k: 1000}"], "knn wants 1000 neighbours"),
    ],
)  # fmt: skip
def test_what_cannot_work_leaves_nothing(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = [] if any(word in SHARED for word in arguments) else SHARED
    overrides = [word for word in arguments if "=" in word and " " not in word.partition("=")[0]]
    command = ["compare", *[word for word in arguments if word not in overrides], *shared, *overrides]
    assert main([*command, "--out", "cmp"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("harmony: ")
    assert told in last
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds something else \(thesis.tex\)"):
        compare([*ROWS, *SHARED], tmp_path, [0])
    with pytest.raises(UserError, match="is a file"):
        compare([*ROWS, *SHARED], tmp_path / "thesis.tex", [0])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "cmp").mkdir()
    for text in ("[]", "null", '{"--seeds": 3}'):
        (tmp_path / "cmp" / "plan.json").write_text(text)
        with pytest.raises(UserError, match="is no plan of a comparison"):
            compare([*ROWS, *SHARED], tmp_path / "cmp", [0])


def test_seeds_are_whole_numbers():
    assert seeds_of("3, 0,12") == [3, 0, 12]
    for text in ("", "1,", "-1", "1.5", str(2**62)):
        with pytest.raises(UserError, match="--seeds"):
            seeds_of(text)
