"""The plan: how many passes a step of Harmony makes, what is merged, and what is refused."""

from contextlib import closing
from functools import partial

import pytest
import torch
from parts import ALL, CLOCK, HEAD, batch_of, learner_of, losses_of
from runs import HERE

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.models.recomputing import set_checkpointing
from harmony.models.text import TextTower
from harmony.models.vision import ImageTower
from harmony.objectives.base import ImageRequest
from harmony.recipe import load
from harmony.training.learner import compile_blocks
from harmony.training.plan import encode
from harmony.training.trainer import Trainer


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(tower, segments or captions, attention) of every encoder pass."""
    seen: list[tuple] = []
    encode, read = ImageTower.encode_packed, TextTower.read

    def watched_encode(self, segments):
        seen.append((self, [tuple(s.pixels.shape) for s in segments]))
        return encode(self, segments)

    def watched_read(self, ids, replace=None, attention="causal", pooled=False):
        seen.append((self, attention, replace is not None, pooled))
        return read(self, ids, replace, attention, pooled)

    monkeypatch.setattr(ImageTower, "encode_packed", watched_encode)
    monkeypatch.setattr(TextTower, "read", watched_read)
    return seen


def test_only_views_that_are_encoded_or_masked_are_cut():
    recipe = load("quickstart", ["objectives.dino=null", "objectives.ibot=null", "model.image.depth=1"])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0, "batch_size": 2})})
    trainer = Trainer(recipe, HERE)
    with closing(trainer.loader.batches(0)) as batches:
        batch = next(batches)
    assert set(recipe.views) == {"global", "local"}
    assert set(batch.images) == trainer.learner.views() == {"global"}


def test_passes_of_a_harmony_step(passes: list[tuple]):
    learner = learner_of(ALL)
    losses_of(learner, batch_of(learner, examples=4))
    teacher = [p[1:] for p in passes if p[0] in (learner.teacher.image, learner.teacher.text)]
    assert teacher == [([(8, 3, 32, 32)],), ("causal", False, False)], (
        "one image pass over the global crops, one text pass"
    )
    student = [p[1:] for p in passes if p[0] in (learner.student.image, learner.student.text)]
    assert student == [
        ([(8, 3, 32, 32), (12, 3, 16, 16)],),  # masked large and whole small crops, packed
        ([(8, 3, 32, 32)],),  # kept patches
        ([(4, 3, 32, 32)],),  # the contrastive crop
        ("causal", False, True),  # of which the contrast reads the end token alone
        ("bidirectional", True, False),
    ]
    groups = [group.objectives for group in learner.plan.groups]
    assert groups == [("dino", "ibot"), ("mae",), ("clip",), ("mlm", "text_distillation")]


def test_a_joint_plan_packs_all_of_the_students_images(passes: list[tuple]):
    learner = learner_of(ALL, joint=True)
    losses_of(learner, batch_of(learner, examples=4))
    assert [len(p[1]) for p in passes if p[0] is learner.student.image] == [4]
    assert len([p for p in passes if p[0] is learner.student.text]) == 2


@pytest.mark.parametrize("removed", sorted(ALL))
def test_each_objective_is_a_switch(removed: str):
    """Weight 0 keeps heads and masks and leaves the other losses exactly as they are."""
    full = learner_of(ALL)
    less = learner_of(ALL | {removed: ALL[removed] | {"weight": 0}})
    expected, found = (losses_of(x, batch_of(x)) for x in (full, less))
    assert set(found) == set(ALL) - {removed}
    for name, loss in found.items():
        assert torch.allclose(loss, expected[name], rtol=1e-12)


def test_sequential_and_joint_give_the_same_gradients_with_stochastic_depth():
    gradients = []
    for joint in (False, True):
        learner = learner_of(ALL, joint=joint, drop_path=0.4)
        for group in learner.losses_by_group(batch_of(learner), CLOCK):
            group.total().backward()
        gradients.append([p.grad for p in learner.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-13)


def test_a_part_of_a_pass_is_sliced_out():
    """The teacher encodes both global crops for DINO; soft CLIP reads the first of them."""
    learner = learner_of({"clip": {"hard_weight": 0.0}, "dino": {"head": HEAD}})
    alone = learner_of({"clip": {"hard_weight": 0.0}})
    alone.student.load_state_dict(learner.student.state_dict())
    alone.teacher.load_state_dict(learner.teacher.state_dict())
    batch = batch_of(learner)
    assert torch.allclose(losses_of(learner, batch)["clip"], losses_of(alone, batch)["clip"], rtol=1e-12)


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ({"dino": {"view": "globl", "head": HEAD}}, "did you mean 'global'"),
        ({"dino": {"mask": "block", "head": HEAD}}, "no objective of this recipe draws"),
        ({"text_distillation": {"head": HEAD}}, "mask 'words'"),
        ({"ibot": {"head": HEAD}, "clip": {"keep": "block"}}, "not equally many in every crop"),
        ({"ibot": {"head": "dino"}}, "which is not a dino objective"),
        ({"ibot": {"head": HEAD}, "b": {"type": "ibot", "head": HEAD}}, "draws a mask 'block'"),
        (
            {"ibot": {"head": HEAD}, "dino": {"view": "local", "local_view": None, "mask": "block", "head": HEAD}},
            "drawn on",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused(objectives: dict, words: str):
    with pytest.raises(UserError, match=words):
        learner_of(objectives)


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_small_crops_are_of_another_view(name: str):
    with pytest.raises(UserError, match="local_view is the view 'global' itself"):
        recipes.resolve(f"{name}-small", [f"objectives.{name}.local_view=global"])


def test_signs_of_a_logged_step():
    learner = learner_of(ALL)
    losses_of(learner, batch_of(learner))
    signs = learner.signs()
    for name in (
        "dino/target_entropy",
        "ibot/prototype_use",
        "text_distillation/teacher_student_kl",
        "clip/temperature",
    ):
        assert torch.isfinite(signs[name]), name
    for model in ("student_image", "teacher_image", "student_text", "teacher_text"):
        assert any(name.startswith(f"{model}/") for name in signs), model
    assert all(value.ndim == 0 and not value.requires_grad for value in signs.values())


@pytest.mark.parametrize("how", ["none", "pointwise"])
def test_compiled_blocks_change_nothing(how: str, monkeypatch: pytest.MonkeyPatch):
    """The blocks are captured whole, for every packing of a step. The backend is the one that takes no minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    plain, compiled = learner_of(ALL, drop_path=0.3), learner_of(ALL, drop_path=0.3)
    compile_blocks(compiled)
    set_checkpointing(compiled, how)
    _assert_same_gradients(plain, compiled)


@pytest.mark.parametrize("how", ["pointwise", "blocks"])
def test_checkpointing_changes_nothing(how: str):
    plain, saving = learner_of(ALL, drop_path=0.3), learner_of(ALL, drop_path=0.3)
    set_checkpointing(saving, how)
    _assert_same_gradients(plain, saving)


def _assert_same_gradients(*learners):
    gradients = []
    for learner in learners:
        for group in learner.losses_by_group(batch_of(learner), CLOCK):
            group.total().backward()
        gradients.append([p.grad for p in learner.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_the_teacher_has_no_stochastic_depth():
    """Its encodings are those of evaluation mode, whatever mode the learner is put into."""
    learner = learner_of(ALL, drop_path=0.5)
    batch = batch_of(learner)
    for mode in (True, False, True):
        learner.train(mode)
        assert learner.student.training is mode
        slow = [learner.teacher, *(slow for o in learner.objectives.values() for _, slow in o.slow_twins())]
        assert not any(module.training for each in slow for module in each.modules())
    encoded = encode(learner.plan.teacher, learner.teacher, batch)
    for request in encoded:
        if isinstance(request, ImageRequest) and request.crops is None:
            for crop in range(2):
                alone = learner.teacher.image.encode(batch.images["global"][crop])
                assert torch.allclose(encoded.image(request).tokens[crop], alone.tokens, rtol=1e-10, atol=1e-12)


def test_every_objective_off_is_refused():
    with pytest.raises(UserError, match="every objective has weight 0"):
        learner_of({"clip": {"weight": 0}})


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ({"mae": {"mask_ratio": 0}}, "keeps 16 of the 16"),
        ({"mae": {"mask_ratio": {"linear": {"from": 0.5, "to": 1.0}}}}, "keeps 0 of the 16"),
        ({"dino": {"view": "plain", "local_view": None, "head": HEAD}}, "compares different crops"),
        ({"mlm": {"decoder": {"heads": 3}}}, "does not divide"),
    ],
)
def test_settings_that_would_give_nan_or_crash(objectives: dict, words: str):
    with pytest.raises(UserError, match=words):
        learner_of(objectives)
