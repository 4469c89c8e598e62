"""Every recipe trains and resumes, shrunk to seconds, and `flickr8k-small` as it is, on the real data."""

import math
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from runs import log_of
from shrunk import shrunk

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.cli import main
from harmony.evaluation import run as evaluate
from harmony.recipe import Recipe
from harmony.training import trainer
from harmony.training.rehearsal import rehearse
from harmony.training.trained import read_trained


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for recipes with a frozen model."""
    return trainer.train(shrunk("clip-small", "train.steps=1"), tmp_path_factory.mktemp("frozen") / "run")


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_recipe_trains_and_resumes(name: str, tmp_path: Path, frozen: Path):
    """Its objectives, views, masks and schedules as written, at tiny sizes."""
    recipe = shrunk(name, frozen=frozen)
    out = trainer.train(recipe, tmp_path / "run")
    log = log_of(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    losses = {key for key in log[0] if key.startswith("loss/")}
    assert {key.split("/")[1] for key in losses} == set(recipe.objectives)
    assert all(math.isfinite(line[key]) for line in log for key in losses)
    shutil.rmtree(max((out / "checkpoints").iterdir()))  # as if the run had been killed after its second step
    trainer.resume(out)
    assert log_of(out) == log, "a resumed run repeats the steps that were lost, bit for bit"
    exports_to_timm(out, recipe, tmp_path)
    if recipe.model.text is not None:
        exports_to_open_clip(out, recipe, tmp_path)


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_recipe_is_measured_by_its_teacher_where_it_has_one(name: str, frozen: Path):
    recipe = shrunk(name, frozen=frozen)
    assert recipe.evaluation.model == (
        "teacher" if rehearse(recipe, caption_tokens=8).learner.plan.teacher else "student"
    )


@torch.no_grad()
def exports_to_timm(run: Path, recipe: Recipe, folder: Path) -> None:
    """Both models of a run; where none is named, the one that is measured."""
    for number, model in enumerate((None, "teacher", "student")):
        out, options = folder / f"timm-{number}", [] if model is None else ["--model", model]
        assert main(["export", str(run), "--to", "timm", "--out", str(out), *options]) == 0
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        pixels = torch.randn(2, 3, theirs.default_cfg["input_size"][1], theirs.default_cfg["input_size"][2])
        ours = read_trained(str(run), model or recipe.evaluation.model).towers.image.eval().encode(pixels).tokens
        assert torch.allclose(theirs.forward_features(pixels), ours, atol=1e-5)


@torch.no_grad()
def exports_to_open_clip(run: Path, recipe: Recipe, folder: Path) -> None:
    """Where its activations allow it: a tiny image tower is open_clip's own ViT, which has that of the text tower."""
    out = folder / "open_clip"
    fits = recipe.model.text.activation == "gelu" and not recipe.model.image.registers
    assert main(["export", str(run), "--to", "open_clip", "--out", str(out)]) == (0 if fits else 2)
    assert out.exists() == fits
    if not fits:
        return
    theirs = open_clip.create_model(f"local-dir:{out}").eval()
    trained = read_trained(str(run))
    pixels, size = torch.randn(2, 3, 32, 32), recipe.model.text.context
    ids = open_clip.tokenize(["a dog", "a red circle"], size)
    assert torch.allclose(theirs.encode_image(pixels), trained.towers.image.eval()(pixels), atol=1e-5)
    assert torch.allclose(theirs.encode_text(ids), trained.towers.text.eval()(ids), atol=1e-5)
    for name, value in trained.contrast().items():
        assert torch.equal(getattr(theirs, name), value)


@pytest.mark.parametrize("name", recipe_files.names())
def test_a_recipe_says_what_it_is(name: str):
    recipe = recipes.resolve(name)
    assert recipe.description and recipe.needs and recipe.family and recipe.paper.startswith("arXiv ")


def test_flickr8k_small_learns_resumes_and_is_evaluated(shared: Path, tmp_path: Path):
    """The recipe itself, on real images and captions. (What a whole run does to every loss is in docs/flickr8k.md.)"""
    flickr = shared / "data" / "captions" / "flickr8k"
    overrides = [
        f"data.train=shards:{flickr}/train-{{00000..00011}}.tar",
        f"data.val=shards:{flickr}/val-{{00000..00001}}.tar",
        "data.batch_size=16",
        "data.workers=0",
        "optim={lr: 0.02, warmup: 2 steps}",
        "train={steps: 12, log_every: 1 step, checkpoint_every: 6 steps}",
    ]
    recipe = recipes.load("flickr8k-small", overrides)
    out = trainer.train(recipe, tmp_path / "run")
    log = log_of(out)
    for key in ("loss", *(f"loss/{objective}" for objective in recipe.objectives)):
        values = [line[key] for line in log]
        assert all(map(math.isfinite, values)), key
        if key in ("loss", "loss/mae", "loss/mlm"):  # the others' targets still move at this age
            assert sum(values[-3:]) < 0.98 * sum(values[:3]), key
    newest = max((out / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # as if the run had been killed after its sixth step
    trainer.resume(out)
    assert log_of(out) == log, "a resumed run repeats the steps that were lost, bit for bit"
    metrics = evaluate(str(out), "retrieval", recipe.data.val, settings={"max_examples": 64}, out=tmp_path / "val")
    assert metrics["images"] == 64 and metrics["captions"] >= 64 * 4
    assert metrics["chance_text_to_image_recall@10"] == pytest.approx(10 / 64)
