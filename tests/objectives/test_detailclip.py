"""DetailCLIP against a plain transcription; the three objectives of its recipe share one pass over what is attended."""

import pytest
import torch
import torch.nn.functional as F
from parts import CLOCK, HEAD, assert_same, batch_of, learner_of, losses_of

from harmony.errors import UserError
from harmony.models.vision import Segment

DETAIL = {"decoder": {"depth": 2, "heads": 2}, "head": HEAD, "removed": 0.6, "side": 1}
ALL = {
    "clip": {"keep": "attended", "crops": 2},
    "dino": {"local_view": None, "keep": "attended", "head": HEAD},
    "detailclip": DETAIL,
}

FACTORS = torch.tensor([1.0, 3.0], dtype=torch.float64)
"""Losses on one graph are compared by a sum in which they differ."""


def attended(learner, image: torch.Tensor, side: int = 1) -> list[int]:
    """The patches that the teacher's class token attends to most, from the queries and keys of its blocks.

    6 of the 16 patches, or one of the four squares of them.
    """
    trunk, seen = learner.teacher.image.trunk, []
    hooks = [b.attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out[0])) for b in trunk.blocks]
    trunk.forward_features(image[None])
    for hook in hooks:
        hook.remove()
    weights = torch.zeros(17, dtype=torch.float64)
    for qkv in seen:
        for head in range(2):
            query, key = (qkv[:, part * 16 + head * 8 : part * 16 + head * 8 + 8] for part in (0, 1))
            weights += (key @ query[0] / 8**0.5).softmax(0)
    if side == 1:
        return sorted(weights[1:].topk(int(16 * 0.4)).indices.tolist())
    squares = [[8 * r + 2 * c + n for n in (0, 1, 4, 5)] for r in range(2) for c in range(2)]
    return max(squares, key=lambda square: float(weights[1:][square].sum()))


@pytest.mark.parametrize(("normalise", "side", "shared"), [(True, 1, False), (False, 1, True), (True, 2, False)])
def test_detailclip(normalise: bool, side: int, shared: bool):
    settings = DETAIL | {"normalise_targets": normalise, "teacher_temperature": 0.05, "side": side}
    dino = {"dino": {"head": HEAD, "weight": 0}} if shared else {}
    learner = learner_of({**dino, "detailclip": settings | ({"head": "dino"} if shared else {})})
    batch, detail = batch_of(learner, examples=3), learner.objectives["detailclip"]
    owner = learner.objectives["dino"] if shared else detail
    with torch.no_grad():
        detail.centre.mean.normal_()
    found = losses_of(learner, batch)
    assert set(found) == {"detailclip/patches", "detailclip/pixels"}
    patches, pixels = [], []
    for image in batch.images["global"].flatten(0, 1):
        kept, decoder = attended(learner, image, side), detail.decoder
        seen = learner.student.image.encode_packed([Segment(image[None], keep=torch.tensor([kept]))])[0].tokens[0]
        embedded = decoder.embed(seen)
        sequence = [embedded[0] + decoder.positions[0, 0]]
        for n in range(16):
            token = embedded[1 + kept.index(n)] if n in kept else decoder.mask_token
            sequence.append(token + decoder.positions[0, 1 + n])
        x = torch.stack(sequence)[None]
        for block in decoder.blocks:
            x = block(x)
        features = decoder.norm(x)[0, 1:]
        with torch.no_grad():
            scores = owner.teacher_head(learner.teacher.image.encode(image[None]).patches[0])
            targets = ((scores - detail.centre.mean) / 0.05).softmax(-1)
        for n in range(16):
            if n in kept:
                continue
            patches.append(-(targets[n] * (owner.head(features[n][None])[0] / 0.1).log_softmax(-1)).sum())
            row, column = divmod(n, 4)
            patch = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            target = patch.permute(1, 2, 0).flatten()
            if normalise:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            pixels.append(F.mse_loss(decoder.pixels(features[n]), target))
    assert len(patches) == 2 * 3 * (16 - (6 if side == 1 else 4))
    expected = torch.stack([torch.stack(patches).mean(), torch.stack(pixels).mean()])
    ours = torch.stack([found["detailclip/patches"], found["detailclip/pixels"]])
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert_same(ours @ FACTORS, expected @ FACTORS, learner)


def test_the_centre_is_the_mean_score_of_all_patches():
    learner = learner_of({"detailclip": DETAIL | {"centre_momentum": 0.5}})
    batch, detail = batch_of(learner), learner.objectives["detailclip"]
    losses_of(learner, batch)
    assert not detail.centre.mean.any()
    scores = detail.teacher_head(
        learner.teacher.image.encode(batch.images["global"].flatten(0, 1)).patches.flatten(0, 1)
    )
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(detail.centre.mean, scores.mean(0) / 2)
    losses_of(learner, batch)
    learner.after_update(CLOCK, 1.0, torch.tensor(False))
    learner.after_update(CLOCK, 1.0, torch.tensor(True))
    assert torch.allclose(detail.centre.mean, scores.mean(0) / 2), "a skipped step leaves no trace"


def test_clip_and_dino_see_what_the_teacher_attends_to_in_both_crops():
    learner = learner_of(ALL)
    batch = batch_of(learner)
    found = losses_of(learner, batch)
    [group] = learner.plan.groups
    assert group.objectives == ("clip", "dino", "detailclip") and len(group.student.images) == 1
    assert len(learner.plan.teacher.images) == 1
    every = []
    for image in batch.images["global"].flatten(0, 1):
        keep = torch.tensor([attended(learner, image)])
        every.append(learner.student.image.encode_packed([Segment(image[None], keep=keep)])[0])
    embedded = F.normalize(torch.cat([one.embed() for one in every]), dim=-1)
    texts = F.normalize(learner.student.text(batch.captions["caption"]), dim=-1)
    own, meetings = torch.arange(len(batch)), []
    for crop in embedded.split(len(batch)):
        logits = learner.objectives["clip"].logit_scale.exp() * crop @ texts.T
        meetings.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    clip = (meetings[0] + meetings[1]) / 2
    dino = learner.objectives["dino"]
    student = (dino.head(torch.cat([one.cls for one in every])) / 0.1).log_softmax(-1).unflatten(0, (2, -1))
    with torch.no_grad():
        slow = dino.teacher_head(learner.teacher.image.encode(batch.images["global"].flatten(0, 1)).cls)
        targets = (slow / 0.04).softmax(-1).unflatten(0, (2, -1))
    expected = torch.stack([clip, -(targets * student.flip(0)).sum(-1).mean()])
    ours = torch.stack([found["clip"], found["dino"]])
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert_same(ours @ FACTORS, expected @ FACTORS, learner)


def test_signs_of_collapse_fire():
    learner = learner_of({"detailclip": DETAIL | {"teacher_temperature": 1.0}})
    batch, detail = batch_of(learner), learner.objectives["detailclip"]
    losses_of(learner, batch)
    assert float(learner.signs()["detailclip/prototype_use"]) > 0.5
    with torch.no_grad():
        detail.centre.mean[1:] = 100.0
    losses_of(learner, batch)
    assert float(learner.signs()["detailclip/prototype_use"]) < 0.1, "one prototype for all"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"removed": 0.99}, "keeps 0 of the 16"),
        ({"removed": 0.99, "side": 2}, "keeps 0 of the 4 squares"),
        ({"side": 3}, "does not divide the 4 patches a side"),
        ({"decoder": {"heads": 3}}, "not a multiple of its 3 heads"),
        ({"head": "mae"}, "objective detailclip borrows the head of 'mae', which is not a dino objective"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, words: str):
    with pytest.raises(UserError, match=words):
        learner_of({"detailclip": DETAIL | settings})
