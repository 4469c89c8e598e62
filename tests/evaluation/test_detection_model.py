"""The parts of the detector, against other ways of computing the same."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.detection.image_list import ImageList

from harmony.errors import UserError
from harmony.evaluation.detection.detector import Detector
from harmony.evaluation.detection.heads import STAGES, BoxHeads
from harmony.evaluation.detection.masks import masks_within, paste
from harmony.evaluation.detection.proposals import Anchors, build_proposals, in_crowd
from harmony.evaluation.detection.pyramid import SimplePyramid, pool, strides
from harmony.evaluation.detection.windows import WindowedViT, attend_in_windows, global_blocks
from harmony.evaluation.settings import DetectionConfig

CONFIG = DetectionConfig(channels=8, regions=16, proposals=20, drop_path=0.0, window=3)


def vit(size=40, patch=8, depth=8, **settings):
    torch.manual_seed(0)
    model = VisionTransformer(
        size, patch, embed_dim=16, depth=depth, num_heads=2, num_classes=0, init_values=0.5, **settings
    )
    return model.eval()


WITH_REGISTERS = {"reg_tokens": 2}
WITHOUT_CLASS = {"class_token": False, "global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize("settings", [{}, WITH_REGISTERS, WITHOUT_CLASS, {"no_embed_class": True, "pre_norm": True}])
@pytest.mark.parametrize("window", [5, 99, None])
def test_a_window_that_covers_the_grid_is_global_attention(settings, window):
    model, pixels = vit(**settings), torch.randn(2, 3, 40, 40)
    expected = model.forward_features(pixels)[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (5, 5))
    torch.testing.assert_close(WindowedViT(model, window)(pixels), expected)
    # The computation in windows itself, not the short cut around it.
    tokens = torch.randn(2, model.num_prefix_tokens + 25, 16)
    within = attend_in_windows(model.blocks[0].attn, tokens, (5, 5), 5, model.num_prefix_tokens)
    torch.testing.assert_close(within, model.blocks[0].attn(tokens))


def test_blocks_with_windows_are_timms_blocks_run_on_each_window():
    model, pixels = vit(**WITHOUT_CLASS), torch.randn(2, 3, 40, 40)
    x = model._pos_embed(model.patch_embed(pixels)).unflatten(1, (5, 5))
    for place, block in enumerate(model.blocks):
        if place in (1, 3, 5, 7):
            x = block(x.flatten(1, 2)).unflatten(1, (5, 5))
            continue
        y = torch.empty_like(x)
        for rows in (slice(0, 3), slice(3, 5)):
            for columns in (slice(0, 3), slice(3, 5)):
                part = x[:, rows, columns]
                y[:, rows, columns] = block(part.flatten(1, 2)).unflatten(1, part.shape[1:3])
        x = y
    torch.testing.assert_close(WindowedViT(model, 3)(pixels), model.norm(x).permute(0, 3, 1, 2))


def test_class_and_register_tokens_are_in_every_window_and_take_the_mean():
    model = vit(**WITH_REGISTERS)
    attn, prefix = model.blocks[0].attn, 3
    x = torch.randn(2, prefix + 4 * 7, 16)
    special, grid = x[:, :prefix], x[:, prefix:].unflatten(1, (4, 7))
    means, out = torch.zeros_like(special), torch.empty_like(grid)
    for top in (0, 3):
        for left in (0, 3, 6):
            part = grid[:, top : top + 3, left : left + 3]
            made = attn(torch.cat([special, part.flatten(1, 2)], 1))
            means += made[:, :prefix] * part.shape[1] * part.shape[2] / 28
            out[:, top : top + 3, left : left + 3] = made[:, prefix:].unflatten(1, part.shape[1:3])
    expected = torch.cat([means, out.flatten(1, 2)], 1)
    torch.testing.assert_close(attend_in_windows(attn, x, (4, 7), 3, prefix), expected)


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, {2, 5, 8, 11}), (24, {5, 11, 17, 23}), (4, {0, 1, 2, 3}), (2, {0, 1}), (1, {0})]
)
def test_four_blocks_spread_evenly_attend_globally(depth, expected):
    assert global_blocks(depth) == expected


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_other_models_than_plain_vits_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    with pytest.raises(UserError, match="needs a plain ViT, and it is another kind"):
        WindowedViT(model, 14, "it")


@pytest.mark.parametrize(("side", "sides"), [(8, [32, 16, 8, 4, 2]), (5, [20, 10, 5, 3, 2]), (1, [4, 2, 1, 1, 1])])
def test_shapes_of_the_pyramid(side, sides):
    levels = SimplePyramid(16, 8)(torch.randn(2, 16, side, side))
    assert [tuple(level.shape) for level in levels] == [(2, 8, own, own) for own in sides]
    assert strides(14) == [3.5, 7, 14, 28, 56]


def ramps(strides, size):
    """Maps whose two channels are the x and y in px of each cell's centre."""
    levels = []
    for stride in strides:
        at = (torch.arange(round(size / stride)) + 0.5) * stride
        levels.append(torch.stack(torch.meshgrid(at, at, indexing="xy"))[None])
    return levels


@pytest.mark.parametrize("patch", [14, 16])
def test_pooling_finds_the_places_of_boxes_on_every_level(patch):
    levels = ramps(strides(patch)[:4], 448)
    boxes = torch.tensor([[40.0, 60, 75, 100], [30, 20, 200, 220], [100, 50, 400, 400], [20, 60, 30, 70]])
    pooled = pool(levels, strides(patch)[:4], [boxes], 7)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    torch.testing.assert_close(pooled.mean((2, 3)), centres, atol=0.01, rtol=0)
    seventh = (boxes[:, 2] - boxes[:, 0]) / 7
    torch.testing.assert_close((pooled[:, 0].diff(dim=2)).mean((1, 2)), seventh, atol=0.01, rtol=0)


def test_large_boxes_are_pooled_from_coarse_levels():
    levels = [torch.full((1, 1, 448 // s, 448 // s), float(s)) for s in (4, 8, 16, 32)]
    boxes = [torch.tensor([[0.0, 0, side, side] for side in (20, 111, 113, 223, 225, 440)])]
    assert pool(levels, [4, 8, 16, 32], boxes, 2)[:, 0, 0, 0].tolist() == [4, 4, 8, 8, 16, 16]


def test_anchors_lie_on_strides_that_are_not_whole():
    levels = [torch.zeros(1, 1, side, side) for side in (64, 32)]
    anchors = Anchors([7.0, 20.5], [3.5, 7.0])(ImageList(torch.zeros(1, 3, 224, 224), [(224, 224)]), levels)[0]
    assert len(anchors) == 3 * (64**2 + 32**2)
    centres, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(centres[3 * 63], torch.tensor([63 * 3.5, 0.0]))
    torch.testing.assert_close(centres[-1], torch.tensor([31 * 7.0, 31 * 7.0]))
    torch.testing.assert_close(sides[[0, -1]].prod(1).sqrt(), torch.tensor([7.0, 20.5]))
    torch.testing.assert_close(sides[:3, 1] / sides[:3, 0], torch.tensor([0.5, 1, 2]))


def test_what_lies_in_a_crowd():
    crowd = torch.tensor([[10.0, 10, 50, 50], [60, 0, 70, 10]])
    boxes = torch.tensor([[20.0, 20, 30, 30], [0, 0, 60, 60], [40, 20, 60, 30], [41, 20, 61, 30], [80, 80, 90, 90]])
    assert in_crowd(boxes, crowd).tolist() == [True, False, True, False, False]
    assert in_crowd(boxes, crowd[:0]).tolist() == [False] * 5


def test_crowds_are_neither_things_nor_ground():
    torch.manual_seed(0)
    network = build_proposals(8, [8.0, 16, 32, 64, 128], strides(8), 20)
    crowd = torch.tensor([[32.0, 0, 64, 64]])
    target = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1]), "crowd": crowd}
    levels = SimplePyramid(16, 8)(torch.randn(1, 16, 8, 8))
    anchors = network.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), levels)
    labels = network.assign_targets_to_anchors(anchors, [target])[0][0]
    inside = in_crowd(anchors[0], crowd)
    assert inside.any() and (labels[inside] == -1).all() and (labels == 1).any() and (labels == 0).any()

    boxes = BoxHeads("mask_rcnn", 8, 2, strides(8)[:-1], 16, 0.05, 100)
    within = torch.tensor([[40.0, 10, 50, 20], [5, 4, 20, 20], [20, 40, 28, 50]])
    _, sampled = boxes.losses(levels[:-1], [within], [(64, 64)], [target])
    assert {tuple(box) for box in sampled.boxes[0].tolist()} == {(5, 4, 20, 20), (4, 4, 20, 20), (20, 40, 28, 50)}


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade"])
def test_an_image_that_is_all_crowd_has_a_loss(head):
    detector = Detector(WindowedViT(vit(64), 3), 3, 64, True, CONFIG.model_copy(update={"head": head})).train()
    crowd = targets()[1] | {"crowd": torch.tensor([[-200.0, -200, 300, 300]])}
    losses = detector.losses(torch.randn(1, 3, 64, 64), [(64, 64)], [crowd])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


class Always(nn.Module):
    """A box head of the same opinion on every region."""

    def __init__(self, shares, offsets):
        super().__init__()
        self.shares, self.offsets = torch.tensor(shares), torch.tensor(offsets)

    def forward(self, x):
        return self.shares.log().expand(len(x), -1), self.offsets.expand(len(x), -1)


def test_a_cascade_refines_boxes_and_averages_scores():
    heads = BoxHeads("cascade", 8, 2, strides(8)[:-1], 16, 0.05, 100)
    # Half a width to the right, then a quarter down, then twice as wide; offsets are counted in their stage's weights.
    moves = [[5.0, 0, 0, 0], [0, 5.0, 0, 0], [0, 0, 15 * float(np.log(2)), 0]]
    shares = [[0.1, 0.6, 0.3], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2]]
    heads.heads = nn.ModuleList(Always(*both) for both in zip(shares, moves, strict=True))
    found = heads.detect(
        [torch.zeros(1, 8, s, s) for s in (32, 16, 8, 4)], [torch.tensor([[8.0, 8, 24, 24]])], [(64, 64)]
    )
    torch.testing.assert_close(found[0]["scores"], torch.tensor([0.6, 0.2]))
    assert found[0]["labels"].tolist() == [1, 2]
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[8.0, 12, 40, 28]] * 2))


def test_stages_of_a_cascade_ask_for_more_overlap_each():
    heads = BoxHeads("cascade", 8, 1, strides(8)[:-1], 16, 0.05, 100)
    thing, region = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 20, 31]])  # an IoU of 0.645
    labels = [
        rules.assign_targets_to_proposals([region], [thing], [torch.tensor([1])])[1][0].item() for rules in heads.rules
    ]
    assert labels == [1, 1, 0]
    assert [stage.iou for stage in STAGES["cascade"]] == [0.5, 0.6, 0.7]


def targets(size=64):
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 4:20, 8:24] = masks[1, 30:50, 30:60] = 1
    boxes = torch.tensor([[8.0, 4, 24, 20], [30, 30, 60, 50]])
    some = {"boxes": boxes, "labels": torch.tensor([1, 3]), "crowd": torch.zeros(0, 4), "masks": masks}
    none = {"boxes": boxes[:0], "labels": some["labels"][:0], "crowd": boxes[:1], "masks": masks[:0]}
    return some, none


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade"])
def test_every_weight_has_a_gradient_whatever_is_on_the_images(head):
    """Ranks average gradients, so which weights have one must not depend on the images."""
    detector = Detector(WindowedViT(vit(64), 3), 3, 64, True, CONFIG.model_copy(update={"head": head})).train()
    some, none = targets()
    for given in ([some, none], [none, none]):
        detector.zero_grad(set_to_none=True)
        losses = detector.losses(torch.randn(2, 3, 64, 64), [(64, 64), (40, 64)], given)
        sum(losses.values()).backward()
        without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
        assert without == []
        assert all(loss.isfinite() for loss in losses.values())
    assert losses["masks"] == 0


def test_sixteen_bits_do_not_reach_the_coordinates():
    detector = Detector(WindowedViT(vit(64), 3), 3, 64, True, CONFIG.model_copy(update={"min_score": 0.0})).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = detector.detect(torch.randn(1, 3, 64, 64), [(64, 64)])[0]
        losses = detector.train().losses(torch.randn(1, 3, 64, 64), [(64, 64)], [targets()[0]])
    assert {value.dtype for name, value in found.items() if name != "labels"} == {torch.float32}
    assert len(found["boxes"]) > 20
    assert all(loss.isfinite() for loss in losses.values())


def test_images_of_a_batch_do_not_see_each_other():
    detector = Detector(WindowedViT(vit(64), 3), 3, 64, True, CONFIG.model_copy(update={"min_score": 0.0})).eval()
    pixels, sizes = torch.randn(2, 3, 64, 64), [(64, 48), (30, 64)]
    both = detector.detect(pixels, sizes)
    for place in (0, 1):
        alone = detector.detect(pixels[place : place + 1], sizes[place : place + 1])[0]
        assert both[place]["boxes"][:, 3].max() <= sizes[place][0]
        for name, value in alone.items():
            torch.testing.assert_close(both[place][name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("box", [[7.0, 5, 33, 41], [7.4, 5.7, 32.2, 40.1], [-3.0, 20, 20, 58], [0.0, 0, 64, 48]])
def test_a_mask_cut_from_a_box_and_put_back_is_the_same(box):
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    left, top, right, bottom = box
    middle, radius = ((left + right) / 2, (top + bottom) / 2), ((right - left) / 2, (bottom - top) / 2)
    mask = ((x - middle[0]) / radius[0]) ** 2 + ((y - middle[1]) / radius[1]) ** 2 <= 1
    cut = masks_within(mask[None].to(torch.uint8), torch.tensor([0]), torch.tensor([box]), 28)
    back = torch.from_numpy(paste(cut[0], torch.tensor(box), 48, 64)).bool()
    assert (back & mask).sum() / (back | mask).sum() > 0.93
    for axis in (0, 1):  # no shift: the centres agree to a third of a pixel
        centres = [part.nonzero()[:, axis].float().mean() for part in (back, mask)]
        assert abs(centres[0] - centres[1]) < 0.3


def test_a_full_mask_fills_its_box_and_an_empty_box_nothing():
    full = torch.ones(28, 28)
    assert paste(full, torch.tensor([3.0, 4, 10, 12]), 20, 20).sum() == 7 * 8
    assert paste(full, torch.tensor([3.0, 4, 3, 12]), 20, 20).sum() == 0
    assert paste(full, torch.tensor([15.0, 15, 20, 20]), 20, 20)[15:, 15:].all()


def test_the_trunk_keeps_its_weights():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    trunk = WindowedViT(model, 3)
    assert {name.removeprefix("model.") for name in trunk.state_dict()} == set(before)
    torch.testing.assert_close(trunk.state_dict()["model.blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
