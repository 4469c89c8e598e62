"""The image tower against timm's own forward pass, and its masked, kept-token and packed passes against plain ones."""

import math

import pytest
import timm
import torch

from harmony.chance import Chance
from harmony.errors import UserError
from harmony.models.settings import ImageConfig
from harmony.models.vision import ImageTower, Segment

SMALL = {"patch": 8, "width": 32, "depth": 3, "heads": 2}


def tower(name: str = "vit_tiny_patch16_224", size: int = 32, **changes) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(ImageConfig(name=name, **(SMALL | changes)), size, embed=16)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_224", "vit_base_patch16_224"],
)
@pytest.mark.parametrize("size", [32, 48])
def test_whole_images_are_encoded_as_timm_does(name: str, size: int):
    """timm resizes positions itself when told to expect any size; class token, registers and pre-norm included."""
    ours = tower(name).double().eval()
    theirs = timm.create_model(
        name, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    theirs.load_state_dict(ours.trunk.state_dict())
    theirs.double().eval()
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64)
    # timm resizes positions in float32 whatever their type.
    tolerance = 1e-10 if size == 32 else 1e-5
    assert torch.allclose(ours.encode(pixels).tokens, theirs.forward_features(pixels), rtol=tolerance, atol=tolerance)


def test_trunk_is_a_timm_state_dict():
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.manual_seed(0)
    ours = ImageTower(ImageConfig(name="vit_tiny_patch16_224"), 224, embed=16)
    assert set(ours.trunk.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(ours.trunk.state_dict())


def test_packed_sizes_equal_separate_passes_in_values_and_gradients():
    ours = tower().double()
    large = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    small = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    packed = ours.encode_packed([Segment(large), Segment(small)])
    apart = [ours.encode(large), ours.encode(small)]
    for together, alone in zip(packed, apart, strict=True):
        assert torch.allclose(together.tokens, alone.tokens, rtol=1e-10, atol=1e-12)
    weights = list(ours.trunk.parameters())
    first = torch.autograd.grad(sum(e.tokens.square().sum() for e in packed), weights)
    second = torch.autograd.grad(sum(e.tokens.square().sum() for e in apart), weights)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_kept_tokens_see_only_each_other():
    """A pass over kept patches is one over an image whose other patches do not exist: changing pixels there changes
    nothing, and keeping all patches in another order permutes the output."""
    ours = tower().double().eval()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = torch.tensor([[0, 5, 6], [1, 2, 15]])
    kept = ours.encode_packed([Segment(pixels, keep=keep)])[0].tokens
    changed = pixels.clone()
    changed[0, :, 24:, 24:] += 1.0  # patch 15, which image 0 does not keep
    assert torch.equal(ours.encode_packed([Segment(changed, keep=keep)])[0].tokens[0], kept[0])
    order = torch.randperm(16).expand(2, -1)
    shuffled = ours.encode_packed([Segment(pixels, keep=order)])[0].patches
    whole = ours.encode(pixels).patches
    assert torch.allclose(shuffled, whole[:, order[0]], rtol=1e-10, atol=1e-12)


def test_masked_patches_are_invisible():
    ours = tower().double().eval()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 15] = True
    before = ours.encode_packed([Segment(pixels, replace=hidden)])[0].tokens
    pixels[0, :, 24:, 24:] += 1.0
    assert torch.equal(ours.encode_packed([Segment(pixels, replace=hidden)])[0].tokens, before)
    nothing = ours.encode_packed([Segment(pixels, replace=torch.zeros_like(hidden))])[0].tokens
    assert torch.equal(nothing, ours.encode(pixels).tokens)


def test_layers_are_the_outputs_of_the_blocks():
    ours = tower().double().eval()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    caught = []
    handle = ours.trunk.blocks[1].register_forward_hook(lambda _m, _i, out: caught.append(out))
    ours.trunk.forward_features(pixels)
    handle.remove()
    encoding = ours.encode(pixels, layers=(1, -1))
    assert torch.allclose(encoding.layers[1], caught[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours.trunk.norm(encoding.layers[-1]), encoding.tokens)


def test_stochastic_depth_drops_the_stated_share_and_keeps_the_mean():
    ours = tower(drop_path=0.4, depth=2).train()
    chance = Chance(torch.arange(4000))
    segment = Segment(torch.zeros(4000, 3, 8, 8), chance=chance)
    from harmony.models.blocks import Packing

    factors = ours._stochastic_depth([segment], Packing(((4000, 2),)))
    assert factors is not None and factors.shape == (2, 2, 8000, 1)
    last = factors[1, :, :, 0].unflatten(1, (4000, 2))
    assert torch.equal(last[..., 0], last[..., 1]), "all tokens of an image share the draw"
    assert abs(float((last == 0).double().mean()) - 0.4) < 0.02
    assert abs(float(last.mean()) - 1) < 0.03
    assert (factors[0] == 1).all(), "the first block is never dropped"


def test_stochastic_depth_belongs_to_the_image_not_to_its_place():
    ours = tower(drop_path=0.5).train()
    pixels = torch.randn(6, 3, 32, 32)
    keys = torch.arange(6)
    together = ours.encode_packed([Segment(pixels, chance=Chance(keys))])[0].tokens
    apart = [
        ours.encode_packed([Segment(pixels[i : i + 1], chance=Chance(keys[i : i + 1]))])[0].tokens for i in range(6)
    ]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)
    assert not torch.allclose(together, ours.eval().encode(pixels).tokens, atol=1e-3)


def test_checkpointing_changes_nothing():
    ours = tower(drop_path=0.3).double().train()
    segment = Segment(torch.randn(4, 3, 32, 32, dtype=torch.float64), chance=Chance(torch.arange(4)))
    gradients = []
    for how in ("none", "pointwise", "blocks"):
        ours.checkpointing = how
        loss = ours.encode_packed([segment])[0].tokens.square().mean()
        gradients.append(torch.autograd.grad(loss, list(ours.trunk.parameters())))
    for a, b, c in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
        assert torch.allclose(a, c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", "not a plain VisionTransformer"),
        ("vit_bse_patch16_224", "did you mean 'vit_base_patch16_224'"),
        ("vit_base_patch16_siglip_224", "no class token"),
        ("vit_base_r50_s16_224", "cuts its patches"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(name: str, words: str):
    with pytest.raises(UserError, match=words):
        ImageTower(ImageConfig(name=name), 224, embed=8)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(UserError, match="not a multiple of the patch size 8"):
        tower(size=30)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="cannot be built"):
        tower(heads=5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_fixed_positions_are_sines_and_cosines_and_are_not_trained(name: str):
    """Of the column, then of the row; none for class token and registers, whether the model has places for them or not.

    The other weights are those of a tower with learned positions.
    """
    ours, learned = tower(name, position_embedding="sine_cosine"), tower(name)
    others = dict(learned.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.requires_grad is (key != "trunk.pos_embed")
        assert key == "trunk.pos_embed" or torch.equal(parameter, others[key]), key
    *rest, patches = ours.trunk.pos_embed[0].split([ours.trunk.pos_embed.shape[1] - 16, 16])
    assert all(not each.any() for each in rest)
    for place in range(16):
        row, column = divmod(place, 4)
        expected = [f(at / 10000 ** (i / 8)) for at in (column, row) for f in (math.sin, math.cos) for i in range(8)]
        assert torch.allclose(patches[place], torch.tensor(expected), atol=1e-6)
    ours.encode(torch.randn(1, 3, 48, 48)).tokens.square().mean().backward()
    assert ours.trunk.pos_embed.grad is None and ours.trunk.cls_token.grad is not None


def test_fixed_positions_need_a_width_of_four():
    with pytest.raises(UserError, match="multiple of 4, and the image tower has 30"):
        tower(width=30, position_embedding="sine_cosine")


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_patch_embedding_is_not_trained(frozen: bool):
    ours = tower(freeze_patches=frozen)
    ours.encode(torch.randn(1, 3, 32, 32)).tokens.square().mean().backward()
    for key, parameter in ours.trunk.named_parameters():
        assert (parameter.grad is None) is (frozen and key.startswith("patch_embed.")), key
