"""MAE and masked language modelling against plain transcriptions, and the properties of their masks."""

import pytest
import torch
import torch.nn.functional as F
from parts import CLOCK, HEAD, assert_same, batch_of, learner_of, losses_of

from harmony.data.batch import Mask
from harmony.models.positions import sine_cosine_positions
from harmony.models.vision import Segment
from harmony.objectives.mae import patchify, unpatchify

DECODER = {"width": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize("over", ["mean", "sum"])
@pytest.mark.parametrize("normalise", [True, False])
def test_mae(over: str, normalise: bool):
    settings = {"decoder": DECODER, "over_crops": over, "normalise_targets": normalise, "mask_ratio": 0.6}
    learner = learner_of({"mae": settings})
    batch, mae = batch_of(learner, examples=3), learner.objectives["mae"]
    ours = losses_of(learner, batch)["mae"]
    decoder, mask = mae.decoder, batch.masks["mae"].masked
    crops = []
    for v in range(2):
        errors = []
        for i in range(3):
            image = batch.images["global"][v, i]
            visible = [n for n in range(16) if not mask[v, i, n]]
            assert len(visible) == int(16 * (1 - 0.6))
            tokens = learner.student.image.encode_packed([Segment(image[None], keep=torch.tensor([visible]))])[
                0
            ].tokens[0]
            embedded = decoder.embed(tokens)
            sequence = [embedded[0] + decoder.positions[0, 0]]
            for n in range(16):
                token = embedded[1 + visible.index(n)] if n in visible else decoder.mask_token
                sequence.append(token + decoder.positions[0, 1 + n])
            x = torch.stack(sequence)[None]
            for block in decoder.blocks:
                x = block(x)
            pixels = decoder.pixels(decoder.norm(x))[0, 1:]
            for n in range(16):
                if n in visible:
                    continue
                row, column = divmod(n, 4)
                patch = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                target = torch.stack([patch[c, y, x] for y in range(8) for x in range(8) for c in range(3)])
                if normalise:
                    target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
                errors.append(F.mse_loss(pixels[n], target))
        crops.append(torch.stack(errors).mean())
    total = sum(crops) if over == "sum" else sum(crops) / 2
    assert_same(ours, total, learner)


def test_the_decoder_tells_places_apart_unless_its_positions_are_left_out():
    """Audit C1: without positions every removed patch of an image gets the same prediction."""
    for positions, spread in (("sine_cosine", True), ("none", False)):
        learner = learner_of({"mae": {"decoder": DECODER | {"positions": positions}}})
        decoder = learner.objectives["mae"].decoder
        tokens = torch.randn(1, 5, 16, dtype=torch.float64)
        predicted = decoder(tokens, 1, torch.tensor([[0, 3, 5, 9]]), torch.tensor([[1, 2, 4, 15]]))
        assert (float(predicted.std(1).max()) > 1e-6) is spread


def test_positions_are_the_published_formula():
    """Each entry, one at a time."""
    width, grid = 16, (3, 5)
    table = sine_cosine_positions(width, grid)
    for row in range(3):
        for column in range(5):
            for i in range(width):
                place = column if i < width // 2 else row
                j = i % (width // 2)
                angle = torch.tensor(place / 10000 ** ((j % (width // 4)) / (width / 4)), dtype=torch.float64)
                expected = angle.sin() if j < width // 4 else angle.cos()
                assert torch.isclose(table[row * 5 + column, i], expected)


def test_patchify_round_trip():
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(pixels, 8), 8, 24), pixels)


def test_reconstruction_keeps_visible_patches_and_a_perfect_prediction_is_the_image():
    learner = learner_of({"mae": {"decoder": DECODER}})
    batch, mae = batch_of(learner, examples=2), learner.objectives["mae"]
    pixels, mask = batch.images["global"], batch.masks["mae"]
    tokens = torch.randn(2, 2, 1 + mask.kept.shape[-1], 16, dtype=torch.float64)
    picture = mae.reconstruct(pixels, tokens, 1, mask)
    difference = patchify((picture - pixels).flatten(0, 1), 8).abs().sum(-1).view(2, 2, 16)
    assert (difference[~mask.masked] == 0).all() and (difference[mask.masked] > 0).all()
    mae._predict = lambda *_: mae.targets(pixels.flatten(0, 1), mask)
    assert torch.allclose(mae.reconstruct(pixels, tokens, 1, mask), pixels)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_mlm(attention: str):
    learner = learner_of({"mlm": {"attention": attention}})
    batch = batch_of(learner)
    ours = losses_of(learner, batch)["mlm"]
    captions, hidden = batch.captions["caption"], batch.masks["words"].masked
    decoder = learner.objectives["mlm"].decoder
    terms = []
    for i in range(len(batch)):
        length = int((captions[i] > 0).sum())
        one, masked = captions[i : i + 1, :length], hidden[i : i + 1, :length]  # alone, without padding
        tokens = learner.student.text.read(one, masked, attention).tokens
        mask = torch.full((length, length), float("-inf")).triu(1) if attention == "causal" else None
        scores = decoder.words(decoder.norm(decoder.transformer(tokens, attn_mask=mask)))[0]
        terms += [F.cross_entropy(scores[t], captions[i, t]) for t in range(length) if hidden[i, t]]
    assert_same(ours, torch.stack(terms).mean(), learner)


ALONE = {"mlm": {}, "text_distillation": {"head": HEAD}, "ibot": {"head": HEAD}}


@pytest.mark.parametrize("name", sorted(ALONE))
def test_nothing_masked_gives_zero_with_a_gradient_not_nan(name: str):
    """Audit C9; the graph must be the same on every rank, so the loss is a zero that has gradients."""
    learner = learner_of({"mlm": {"weight": 0}, "ibot": {"head": HEAD, "weight": 0}} | {name: ALONE[name]})
    batch = batch_of(learner)
    batch.masks = {k: Mask.of(torch.zeros_like(m.masked)) for k, m in batch.masks.items()}
    loss = losses_of(learner, batch)[name]
    assert float(loss.detach()) == 0
    loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    centres = [value for key, value in learner.state_dict().items() if key.endswith("centre.mean")]
    assert centres and all(centre.isfinite().all() for centre in centres)
