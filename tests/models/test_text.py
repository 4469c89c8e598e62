"""The text tower against open_clip's own forward pass."""

import open_clip
import pytest
import torch

from harmony.models.settings import TextConfig
from harmony.models.text import TextTower

CAPTIONS = ["a dog", "two red circles left of a small blue square", "x"]


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig(width=32, layers=3, heads=4), embed=16).double().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return open_clip.tokenize(CAPTIONS)


def test_a_causal_reading_is_open_clips(tower: TextTower, ids: torch.Tensor):
    assert torch.allclose(tower(ids), tower.transformer(ids), rtol=1e-10, atol=1e-12)


def test_captions_cut_to_the_longest_give_the_same_features(tower: TextTower, ids: torch.Tensor):
    longest = int((ids > 0).sum(1).max())
    for attention in ("causal", "bidirectional"):
        short = tower.read(ids[:, :longest], attention=attention).embed()
        assert torch.allclose(short, tower.read(ids, attention=attention).embed(), rtol=1e-10, atol=1e-12)


def test_what_a_word_sees(tower: TextTower, ids: torch.Tensor):
    """Changing the third word: causal leaves the second alone, both directions do not; no reading sees padding."""
    changed = ids.clone()
    changed[1, 3] = 1000
    for attention, equal in (("causal", True), ("bidirectional", False)):
        before, after = (tower.read(x, attention=attention).tokens[1, 2] for x in (ids, changed))
        assert torch.equal(before, after) is equal
    padded = ids.clone()
    padded[0, 10:] = 5  # behind the end token, smaller than its id
    for attention in ("causal", "bidirectional"):
        before, after = (tower.read(x, attention=attention).embed()[0] for x in (ids, padded))
        assert torch.allclose(before, after, rtol=1e-12)


def test_a_masked_word_is_invisible_and_the_end_is_still_found(tower: TextTower, ids: torch.Tensor):
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[1, 2:5] = True
    changed = ids.clone()
    changed[1, 2:5] = torch.tensor([5, 6, 7])
    first, second = (tower.read(x, hidden, "bidirectional") for x in (ids, changed))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.end, ids.argmax(1))
    assert not torch.allclose(first.tokens[1], tower.read(ids, None, "bidirectional").tokens[1])


def test_the_mask_token_is_trained(tower: TextTower, ids: torch.Tensor):
    hidden = (ids > 0) & (ids < 49406)
    tower.train().read(ids, hidden).tokens.square().mean().backward()
    assert tower.mask_token.grad is not None and tower.mask_token.grad.norm() > 0


def test_checkpointing_changes_nothing(tower: TextTower, ids: torch.Tensor):
    tower.train()
    gradients = []
    for how in ("none", "pointwise", "blocks"):
        tower.checkpointing = how
        loss = tower.read(ids, attention="bidirectional").tokens.square().mean()
        gradients.append(torch.autograd.grad(loss, tower.transformer.token_embedding.weight)[0])
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-12)


def test_both_towers_are_an_open_clip_model():
    """The state dicts fill an open_clip CustomTextCLIP over a timm trunk, which then gives the same features."""
    from harmony.models.settings import ModelConfig
    from harmony.models.towers import Towers

    config = {"image": {"name": "vit_tiny_patch16_224"}, "text": {"width": 32, "layers": 2, "heads": 4}, "embed": 16}
    ours = Towers(ModelConfig.model_validate(config), 224).eval()
    theirs = open_clip.CustomTextCLIP(
        embed_dim=16,
        vision_cfg={
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 224,
        },
        text_cfg={"width": 32, "layers": 2, "heads": 4},
    ).eval()
    state = {f"visual.trunk.{k}": v for k, v in ours.image.trunk.state_dict().items()}
    state |= {"visual.head.proj.weight": ours.image.proj.weight, "logit_scale": theirs.logit_scale}
    assert ours.text is not None
    state |= {f"text.{k}": v for k, v in ours.text.transformer.state_dict().items()}
    theirs.load_state_dict(state)
    pixels, ids = torch.randn(2, 3, 224, 224), open_clip.tokenize(CAPTIONS[:2])
    with torch.no_grad():
        assert torch.allclose(ours.image(pixels), theirs.encode_image(pixels), atol=1e-5)
        assert torch.allclose(ours.text(ids), theirs.encode_text(ids), atol=1e-5)
