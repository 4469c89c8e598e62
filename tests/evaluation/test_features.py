import plain_metrics as plain
import pytest
import torch

from harmony.errors import UserError
from harmony.evaluation.crops import spread
from harmony.evaluation.features import Features
from harmony.evaluation.settings import EvaluationConfig


def features(source, encoder=None, **settings):
    """Kept nowhere, so that everything is encoded; test_store.py is about what is kept."""
    config = EvaluationConfig(**{"workers": 0, "batch_size": 4, "features": None} | settings)
    return Features(encoder or plain.ColourEncoder(), source, config)


def test_bad_examples_are_left_out_counted_and_shown(capsys):
    images = features(plain.Colours([0, 1, 2, 3, 4, 5], bad=[0, 1, 2, 3])).images()
    assert images.indices.tolist() == [4, 5]
    assert images.labels.tolist() == [4, 5]
    assert images.embeddings.shape == (2, 7)
    assert [key for key, _ in images.bad] == ["colour-0", "colour-1", "colour-2", "colour-3"]
    assert "4 examples of colours: cannot be read" in capsys.readouterr().err.replace("\n", " ")


def test_nothing_readable_is_an_error():
    with pytest.raises(UserError, match=r"no example of colours: can be read: colour-0 is truncated"):
        features(plain.Colours([0, 1], bad=[0, 1])).images()


def test_embeddings_have_unit_length_and_the_order_of_the_source():
    images = features(plain.Colours([3, 1, 4, 1, 5, 2, 6])).images()
    torch.testing.assert_close(images.embeddings, torch.eye(7)[[3, 1, 4, 1, 5, 2, 6]])
    assert images.captions[2] == ["a black square", "black all over, number 2"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source = plain.Colours([i % 7 for i in range(23)], bad=[4, 17])
    alone, helped = features(source).images(), features(source, workers=workers).images()
    assert helped.embeddings.equal(alone.embeddings)
    assert helped.indices.equal(alone.indices)
    assert (helped.captions, helped.bad) == (alone.captions, alone.bad)


def test_images_are_encoded_once():
    class Counting(plain.ColourEncoder):
        seen = 0

        def see(self, pixels):
            Counting.seen += len(pixels)
            return super().see(pixels)

    once = features(plain.Colours([0, 1, 2]), Counting())
    assert once.images() is once.images()
    assert Counting.seen == 3


def test_equal_texts_are_read_once_and_share_an_embedding():
    seen = []

    class Reading(plain.ColourEncoder):
        def texts(self, texts):
            seen.extend(texts)
            return super().texts(texts)

    texts = ["a red hat", "blue", "a red hat", "green tea", "blue", "a most purple prose", "white", "black"]
    embeddings = features(plain.Colours([0]), Reading()).texts(texts)
    assert sorted(seen) == sorted(set(texts))
    torch.testing.assert_close(embeddings, torch.eye(7)[[0, 2, 0, 1, 2, 6, 5, 4]])


def test_a_part_of_the_data_is_spread_over_all_of_it():
    assert list(spread(10, 5)) == [0, 2, 4, 6, 8]
    assert list(spread(10, None)) == list(spread(10, 12)) == list(range(10))
    assert list(spread(7, 3)) == [0, 2, 4]
    images = features(plain.Colours([0, 1, 2, 3, 4, 5]), max_examples=3).images()
    assert images.indices.tolist() == [0, 2, 4]


def test_embeddings_that_are_not_finite_are_refused():
    class Broken(plain.ColourEncoder):
        def see(self, pixels):
            return super().see(pixels) * float("nan")

    with pytest.raises(UserError, match="not finite"):
        features(plain.Colours([0, 1]), Broken()).images()
