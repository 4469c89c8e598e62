"""Frozen models: their weights and colours, that nothing changes them, and what is refused."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from parts import batch_of, learner_of, losses_of
from runs import HERE, log_of
from safetensors.torch import load_file, save_file
from shrunk import shrunk

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.interchange.frozen import frozen_models
from harmony.models.settings import FrozenConfig, ImageConfig, ModelConfig
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower
from harmony.objectives.base import ImageRequest, Objective, TextRequest
from harmony.training import trainer
from harmony.training.cost import cost_of
from harmony.training.learner import Learner
from harmony.training.trainer import Trainer

IMAGE = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 2, "heads": 2}
GIVEN = {"image": IMAGE, "init": None}
ONE_STEP = "train={steps: 1, checkpoint_every: 1 step}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer.train(shrunk("clip-small", ONE_STEP), tmp_path_factory.mktemp("frozen") / "run")


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max((out / "checkpoints").iterdir()) / "model.safetensors")


def test_a_run_as_a_frozen_model_is_never_changed_and_outlives_its_source(run: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(run, source)
    out = trainer.train(shrunk("beit-small", frozen=source), tmp_path / "run")
    log, trained, given = log_of(out), weights_of(out), weights_of(source)
    trunk = {name: value for name, value in given.items() if name.startswith("teacher.image.trunk.")}
    assert trunk
    for name, value in trunk.items():
        own = name.replace("teacher.", "frozen.tokenizer.", 1)
        assert torch.equal(trained[own], value), name
    shutil.rmtree(source)
    shutil.rmtree(max((out / "checkpoints").iterdir()))
    trainer.resume(out)
    assert log_of(out) == log
    resumed = weights_of(out)
    assert all(torch.equal(value, resumed[name]) for name, value in trained.items())


def test_it_is_no_part_of_what_is_trained_and_stays_in_evaluation_mode(run: Path):
    made = Trainer(shrunk("beit-small", "model.image.drop_path=0.2", frozen=run), HERE)
    learner = made.learner
    frozen = {id(parameter) for parameter in learner.frozen.parameters()}
    assert frozen
    assert set(learner.parts()) == {"image", "beit"}
    groups = made.stepper.optimiser.param_groups
    assert not frozen & {id(parameter) for group in groups for parameter in group["params"]}
    assert not any(module.training for module in learner.frozen.modules()) and learner.student.training


@pytest.mark.parametrize("colours", [{}, {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.5, 0.1)}])
def test_images_are_in_the_frozen_models_colours(colours: dict[str, Any]):
    student = ImageConfig()
    settings = {"tokenizer": FrozenConfig.model_validate({"image": IMAGE | colours, "init": None})}
    tower = frozen_models(settings, student, 32)["tokenizer"].image
    raw = torch.rand(2, 3, 32, 32)

    def normalised(mean, std):
        return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    found = tower.encode(normalised(student.mean, student.std)).tokens
    own = ImageConfig.model_validate(IMAGE | colours)
    assert torch.allclose(found, tower.trunk.forward_features(normalised(own.mean, own.std)), atol=1e-4)
    assert tower.encode(raw).embed().shape == (2, 16), "its embedding is its class token"


def test_one_pass_serves_all_who_ask(monkeypatch: pytest.MonkeyPatch):
    learner = learner_of({"beit": {"codes": 5}}, frozen={"tokenizer": GIVEN})
    seen = []
    encode = ImageTower.encode_packed
    monkeypatch.setattr(
        ImageTower, "encode_packed", lambda self, x: (seen.append((self, torch.is_grad_enabled())), encode(self, x))[1]
    )
    losses_of(learner, batch_of(learner))
    assert seen == [(learner.frozen["tokenizer"].image, False), (learner.student.image, True)]
    given = learner.given(batch_of(learner))
    assert [request.model for request in given] == ["tokenizer"]


def test_cost_counts_its_passes_and_parameters():
    cost = cost_of(recipes.resolve("beit-small", ["data.batch_size=2"]))
    [own] = [one for one in cost.passes if one.model == "tokenizer"]
    [student] = [one for one in cost.passes if one.model == "student"]
    assert own.asked_by == ("beit",) and own.tokens == 26
    assert own.flops == pytest.approx(student.flops / 3, rel=0.03)
    trunk = timm.create_model("vit_tiny_patch16_224", patch_size=8, embed_dim=96, depth=3, num_heads=3, img_size=40)
    assert cost.frozen == {"tokenizer": sum(p.numel() for n, p in trunk.named_parameters() if "head" not in n)}
    assert cost.slow == cost.trained["image"]
    assert "beit" in cost.heads and math.isclose(cost.flops, cost.flops_of("beit"))


class Asking(Objective):
    """An objective that asks for anything."""

    def __init__(self, request) -> None:
        super().__init__(Objective.Config(), None, {})
        self.request = request

    def requests(self):
        return [self.request]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ImageRequest("global", model="tokeniser"), "did you mean 'tokenizer'"),
        (TextRequest(model="tokenizer"), "a frozen model sees images alone"),
        (ImageRequest("global", model="tokenizer", keep="mae"), "sees images whole"),
        (ImageRequest("small", model="tokenizer"), "views.small.size to a multiple of 8"),
    ],
)
def test_what_a_frozen_model_cannot_do(request_, words: str):
    from harmony.data.views import ViewConfig

    views = {"global": ViewConfig(count=2, size=32), "small": ViewConfig(count=1, size=20)}
    towers = Towers(ModelConfig.model_validate({"image": IMAGE | {"patch": 4}, "text": {"width": 8, "heads": 1}}), 32)
    given = frozen_models({"tokenizer": FrozenConfig.model_validate(GIVEN)}, ImageConfig(), 32)
    with pytest.raises(UserError, match=words):
        Learner(towers, {"asking": Asking(request_)}, views, frozen=given)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["frozen.tokenizer.init=runs/none"], "frozen.tokenizer.init names 'runs/none', which does not exist"),
        (["frozen.tokenizer.init=RUN", "frozen.tokenizer.image.heads=1"], r"set frozen.tokenizer.image.heads=2"),
        (["frozen.tokenizer.init=RUN", "frozen.tokenizer.image.mean=[0.5, 0.5, 0.5]"], r"image.mean=\[0.485, 0.456"),
        (["frozen.tokenizer.init=open_clip:ViT-B-16/openai"], r"image.mean=\[0.48145466"),
        (["frozen.tokenizer.init=timm:vit_base_patch16_224.augreg_in1k"], r"image.mean=\[0.5, 0.5, 0.5\]"),
        (["frozen.tokenizer.init=FILE", "frozen.tokenizer.image.depth=3"], "frozen.tokenizer.image, has no weight for"),
        (["objectives.beit.tokenizer=tokenise", "frozen.tokenizer.init=RUN"], "did you mean 'tokenizer'"),
        (["frozen.tokenizer.init=null", "frozen.tokenizer.image.patch=16"], "patches of frozen.tokenizer are 16 px"),
        (["frozen.tokenizer.init=null", "frozen.tokenizer.image.patch=12"], "do not cut images of 32 px evenly"),
        (["frozen.teacher={image: vit_tiny_patch16_224, init: null}"], "frozen.teacher cannot be called so"),
        (["frozen.tokeniser=null"], "unknown frozen model 'tokeniser'; did you mean 'tokenizer'"),
        (["frozen.tokenizer=null"], "known: none"),
    ],
)  # fmt: skip
def test_what_is_refused(overrides: list[str], words: str, run: Path, tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    own = "teacher.image.trunk."
    save_file({k.removeprefix(own): v for k, v in weights_of(run).items() if k.startswith(own)}, file)
    named = [override.replace("RUN", str(run)).replace("FILE", str(file)) for override in overrides]
    with pytest.raises(UserError, match=words):
        Trainer(shrunk("beit-small", *named), HERE)


def test_an_open_source_is_asked_for():
    with pytest.raises(UserError, match=r"leaves frozen.tokenizer.init open; add frozen.tokenizer.init=\.\.\."):
        recipes.load("beit-small")
