import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from harmony.evaluation.segmentation import scores
from harmony.evaluation.segmentation.scores import IGNORE, Confusion


def confusion_of(truth, predicted, classes):
    confusion = Confusion(classes)
    for one, other in zip(truth, predicted, strict=True):
        confusion.add(one, other)
    return confusion


def drawn(seed, classes, present, images=3, side=13):
    """Masks of the first `present` classes alone, a fifth of them without a class, and predictions half right."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(present, (images, side, side), generator=generator)
    noise = torch.randint(present, truth.shape, generator=generator)
    predicted = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth, noise)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    assert present <= classes
    return truth, predicted


@given(st.integers(0, 10**6), st.integers(2, 9), st.data())
def test_scores_are_those_of_torchmetrics(seed, classes, data):
    truth, predicted = drawn(seed, classes, data.draw(st.integers(2, classes)))
    confusion = confusion_of(truth, predicted, classes)
    found = confusion.scores()
    how = {"num_classes": classes, "ignore_index": IGNORE}
    assert found["miou"] == pytest.approx(float(MulticlassJaccardIndex(**how)(predicted, truth)), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(float(MulticlassAccuracy(**how, average="micro")(predicted, truth)))
    each = MulticlassJaccardIndex(**how, average="none")(predicted, truth).double()
    assert torch.allclose(confusion.iou().nan_to_num(0), each, atol=1e-6)
    recall = MulticlassAccuracy(**how, average="none")(predicted, truth).double()
    there = confusion.counts.sum(1) > 0
    assert torch.allclose(confusion.accuracy()[there], recall[there], atol=1e-6)
    assert found["mean_accuracy"] == pytest.approx(recall[there].mean().item(), abs=1e-6)
    assert confusion.ignored == int((truth == IGNORE).sum())


def test_scores_by_hand():
    """Six pixels that count: class 0 has 2 of 3 right, class 1 has 1 of 2, class 2 has 0 of 1; 3 is predicted once."""
    truth = torch.tensor([[0, 0, 0, IGNORE], [1, 1, 2, IGNORE]])
    predicted = torch.tensor([[0, 0, 1, 2], [1, 3, 0, 4]])
    confusion = confusion_of([truth], [predicted], 5)
    assert confusion.ignored == 2
    assert confusion.iou()[:4].tolist() == pytest.approx([2 / 4, 1 / 3, 0, 0])
    assert math.isnan(confusion.iou()[4])  # neither there nor predicted where it counts
    assert confusion.scores() == pytest.approx(
        {"miou": (1 / 2 + 1 / 3) / 4, "mean_accuracy": (2 / 3 + 1 / 2 + 0) / 3, "pixel_accuracy": 3 / 6}
    )
    rows = confusion.classes(["a", "b", "c", "d", "e"])
    assert [row["pixels"] for row in rows] == [3, 2, 1, 0, 0]
    assert (rows[3]["iou"], rows[3]["accuracy"], rows[4]["iou"]) == (0.0, None, None)


def test_a_perfect_prediction_scores_one_and_one_that_is_never_right_zero():
    truth, _ = drawn(0, 6, 4)
    perfect = confusion_of(truth, truth.clamp(min=0), 6).scores()
    assert set(perfect.values()) == {1.0}
    wrong = confusion_of(truth, (truth.clamp(min=0) + 1) % 6, 6).scores()
    assert set(wrong.values()) == {0.0}


def test_always_is_what_a_constant_prediction_scores():
    truth, predicted = drawn(1, 5, 5)
    expected = confusion_of(truth, torch.full_like(predicted, 3), 5)
    assert torch.equal(confusion_of(truth, predicted, 5).always(3).counts, expected.counts)


def test_chunks_do_not_matter(monkeypatch):
    truth, predicted = drawn(2, 5, 5)
    whole = confusion_of(truth, predicted, 5)
    monkeypatch.setattr(scores, "CHUNK", 7)
    pieces = confusion_of(truth, predicted, 5)
    assert torch.equal(whole.counts, pieces.counts)
    assert whole.ignored == pieces.ignored > 0
