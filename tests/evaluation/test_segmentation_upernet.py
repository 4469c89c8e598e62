import pytest
import timm
import torch
import torch.nn.functional as F
from runs_for_evaluation import saved_run, tiny_recipe
from torch import nn

from harmony.errors import UserError
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.segmentation.heads import pixel_loss
from harmony.evaluation.segmentation.scores import IGNORE
from harmony.evaluation.segmentation.upernet import AUXILIARY_WEIGHT, UPerNet, parameter_groups, taps


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(str(saved_run(tmp_path_factory.mktemp("run") / "run", tiny_recipe()).folder))


@pytest.fixture
def model(encoder):
    return UPerNet(encoder.backbone(64), encoder.depth, 64, 5)


def test_blocks_are_those_of_the_papers():
    assert taps(12) == [3, 5, 7, 11]
    assert taps(24) == [7, 11, 15, 23]
    assert taps(2) == [0, 0, 0, 1]
    assert taps(1) == [0, 0, 0, 0]


def test_a_plain_vit_gives_four_sizes(model):
    maps = model._maps(torch.randn(2, 3, 64, 64))
    assert [tuple(one.shape) for one in maps] == [(2, 16, side, side) for side in (32, 16, 8, 4)]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5, 32, 32)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_models_with_maps_of_several_sizes_are_taken_as_they_are(name):
    backbone = timm.create_model(name, num_classes=0)
    model = UPerNet(backbone, 4, 64, 3, channels=8).eval()
    assert all(isinstance(one, nn.Identity) for one in model.neck)
    sides = [one.shape[-1] for one in model._maps(torch.randn(1, 3, 64, 64))]
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) > 1
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, sides[0], sides[0])
    groups = parameter_groups(model, 0.7, 0.1)
    scales = {id(p): group.lr_scale for group in groups for p in group.parameters}
    last = backbone.layer4[-1].conv2 if name == "test_resnet" else backbone.stages[-1].blocks[-1].mlp.fc1
    assert scales[id(last.weight)] == pytest.approx(0.1)


def test_models_without_maps_are_refused():
    with pytest.raises(UserError, match="upernet needs a timm model that gives maps of its blocks"):
        UPerNet(nn.Linear(3, 3), 1, 16, 3)


def test_every_parameter_is_in_one_group_with_the_learning_rate_of_its_layer(model):
    groups = parameter_groups(model, 0.5, 0.1)
    members = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    scale = {id(p): group.lr_scale for group in groups for p in group.parameters}
    decays = {id(p): group.decays for group in groups for p in group.parameters}
    named = dict(model.named_parameters())
    expected = {
        "backbone.patch_embed.proj.weight": 0.1 * 0.5**2,
        "backbone.pos_embed": 0.1 * 0.5**2,
        "backbone.blocks.0.mlp.fc1.weight": 0.1 * 0.5,
        "backbone.blocks.1.mlp.fc1.weight": 0.1,
        "fuse.0.weight": 1.0,
        "auxiliary.1.1.bias": 1.0,
    }
    assert {name: scale[id(named[name])] for name in expected} == pytest.approx(expected)
    assert not any(decays[id(p)] for p in model.parameters() if p.ndim <= 1)
    assert not decays[id(named["backbone.pos_embed"])]
    assert decays[id(named["fuse.0.weight"])]
    assert decays[id(named["backbone.blocks.0.mlp.fc1.weight"])]


def test_the_loss_is_that_of_both_classifiers(model):
    pixels, masks = torch.randn(3, 3, 64, 64), torch.randint(5, (3, 64, 64))
    model.eval()  # no dropout
    maps = model._maps(pixels)
    expected = pixel_loss(model(pixels), masks) + AUXILIARY_WEIGHT * pixel_loss(model.auxiliary(maps[2]), masks)
    assert model.loss(pixels, masks).item() == pytest.approx(expected.item(), rel=1e-5)


def test_all_but_the_encoders_own_end_learns(model):
    model.train()
    model.loss(torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"backbone.norm.weight", "backbone.norm.bias"}


def test_pixels_of_no_class_do_not_count():
    scores, masks = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randint(4, (2, 6, 6))
    masks[0, 2:] = IGNORE
    valid = masks != IGNORE
    expected = F.cross_entropy(scores.movedim(1, -1)[valid], masks[valid])
    assert pixel_loss(scores, masks).item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = pixel_loss(scores, torch.full_like(masks, IGNORE))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))
