import plain_metrics as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.errors import UserError
from harmony.evaluation import retrieval
from harmony.evaluation.retrieval import Pool, examples, image_to_text_ranks, measure, text_to_image_ranks
from harmony.evaluation.settings import EvaluationConfig

CONFIG = EvaluationConfig(batch_size=4, workers=0)


def by_hand(images, texts, captions):
    """Ranks of both directions from the definition, over all captions one by one."""
    listed = [(i, text) for i, own in enumerate(captions) for text in own]
    vectors = {text: texts[place] for place, text in enumerate(dict.fromkeys(text for _, text in listed))}
    text_to_image = [plain.rank(vectors[text], list(images), {owner}) for owner, text in listed]
    image_to_text = [
        plain.rank(
            images[i],
            [vectors[text] for _, text in listed],
            {place for place, (_, text) in enumerate(listed) if text in captions[i]},
        )
        for i in range(len(images))
    ]
    return text_to_image, image_to_text


@given(st.data())
def test_ranks_are_those_of_the_definition(data):
    words = st.sampled_from(["a", "b", "c", "d", "e", "f", "g"])  # few, so that images share captions
    captions = data.draw(st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=6))
    pool = Pool.of(captions)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    images = torch.randint(-2, 3, (len(captions), 3), generator=generator) / 4
    texts = torch.randint(-2, 3, (len(pool.texts), 3), generator=generator) / 4
    expected = by_hand(images, texts, captions)
    assert text_to_image_ranks(images, texts, pool).tolist() == expected[0]
    assert image_to_text_ranks(images, texts, pool).tolist() == expected[1]


def test_a_small_case_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    captions = [["east", "somewhere"], ["north"], ["north-east"]]
    texts = torch.tensor([[0.8, 0.6], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    pool = Pool.of(captions)
    # "east" is 0.80, 0.60 and 0.96 similar: second. "somewhere" is furthest from its image. "north-east" points east.
    assert text_to_image_ranks(images, texts, pool).tolist() == [2, 3, 1, 2]
    # The first image is nearest to "north-east"; its best own caption is second. The third one is nearest to "east".
    assert image_to_text_ranks(images, texts, pool).tolist() == [2, 1, 3]


def test_a_perfect_predictor_finds_everything():
    images = torch.eye(40)
    captions = [[f"caption {j} of {i}" for j in range(1 + i % 5)] for i in range(40)]
    pool = Pool.of(captions)
    metrics = measure(*both(images, images[pool.owner], pool), pool)
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_recall@{k}"] == metrics[f"image_to_text_recall@{k}"] == 1
    assert metrics["text_to_image_median_rank"] == metrics["image_to_text_median_rank"] == 1
    assert metrics["duplicate_captions"] == 0


def test_a_constant_encoder_finds_nothing():
    captions = [[f"caption {j} of {i}" for j in range(5)] for i in range(20)]
    pool = Pool.of(captions)
    metrics = measure(*both(torch.ones(20, 1), torch.ones(100, 1), pool), pool)
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_recall@{k}"] == metrics[f"image_to_text_recall@{k}"] == 0


def test_random_embeddings_find_by_chance():
    generator = torch.Generator().manual_seed(5)
    captions = [[f"caption {j} of {i}" for j in range(1 + i % 5)] for i in range(1500)]
    pool = Pool.of(captions)
    images = plain.unit(torch.randn(1500, 24, generator=generator))
    texts = plain.unit(torch.randn(len(pool.texts), 24, generator=generator))
    metrics = measure(*both(images, texts, pool), pool)
    for direction, queries in (("text_to_image", len(pool.owner)), ("image_to_text", 1500)):
        chance = metrics[f"chance_{direction}_recall@10"]
        assert abs(metrics[f"{direction}_recall@10"] - chance) < 4 * (chance / queries) ** 0.5


def both(images, texts, pool):
    return text_to_image_ranks(images, texts, pool), image_to_text_ranks(images, texts, pool)


def test_captions_that_several_images_share():
    captions = [["a dog", "a brown dog"], ["a dog"], ["a cat"]]
    pool = Pool.of(captions)
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    t2i, i2t = both(images, texts, pool)
    # Both dogs look alike, so neither is found before the other; the words themselves are found at once.
    assert t2i.tolist() == [2, 2, 2, 1]
    assert i2t.tolist() == [1, 1, 1]
    metrics = measure(t2i, i2t, pool)
    assert metrics["duplicate_captions"] == 0.5
    assert metrics["chance_image_to_text_recall@1"] == pytest.approx((3 / 4 + 2 / 4 + 1 / 4) / 3)


def test_a_caption_given_twice_for_one_image_is_no_duplicate():
    pool = Pool.of([["a dog", "a dog"], ["a cat"]])
    metrics = measure(*both(torch.eye(2), torch.eye(2), pool), pool)
    assert metrics["duplicate_captions"] == 0
    assert metrics["captions"] == 3
    assert metrics["text_to_image_recall@1"] == 1


def test_run_counts_what_it_leaves_out():
    class Silent(plain.Colours):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return type(example)(example.key, example.image, example.captions if i % 3 else [], example.label)

    features = plain.setup(plain.ColourEncoder(), Silent([0, 1, 2, 3, 4, 5, 6], bad=[1]), CONFIG)
    outcome = retrieval.run(features)
    assert outcome.metrics["bad_examples"] == 1
    assert outcome.metrics["without_caption"] == 3
    assert outcome.metrics["images"] == 3
    assert outcome.metrics["text_to_image_recall@1"] == 1


def test_only_the_first_captions_when_asked():
    config = CONFIG.model_copy(update={"retrieval": CONFIG.retrieval.model_copy(update={"captions": 1})})
    outcome = retrieval.run(plain.setup(plain.ColourEncoder(), plain.Colours([0, 1, 2]), config))
    assert outcome.metrics["captions"] == 3


def test_no_captions_at_all_is_an_error():
    class Mute(plain.Colours):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return type(example)(example.key, example.image, [], example.label)

    with pytest.raises(UserError, match="no example of colours: has a caption"):
        retrieval.run(plain.setup(plain.ColourEncoder(), Mute([0, 1]), CONFIG))


def test_examples_are_the_best_and_the_worst():
    generator = torch.Generator().manual_seed(1)
    captions = [[f"caption {i}"] for i in range(30)]
    pool = Pool.of(captions)
    images = plain.unit(torch.randn(30, 6, generator=generator))
    texts = plain.unit(images + torch.linspace(0, 3, 30)[:, None] * torch.randn(30, 6, generator=generator))
    ranks = text_to_image_ranks(images, texts, pool)
    places = torch.arange(30) * 10  # positions in the source
    shown = examples(images, texts, pool, ranks, places)
    assert [one["rank"] for one in shown["best"]] == sorted(ranks.tolist())[:6]
    assert [one["rank"] for one in shown["worst"]] == sorted(ranks.tolist(), reverse=True)[:6]
    for one in shown["best"]:
        caption = captions.index([one["caption"]])
        assert one["image"] == caption * 10
        nearest = sorted(range(30), key=lambda i: -plain.similarity(texts[caption], images[i]))[:5]
        assert [first["image"] for first in one["first"]] == [10 * i for i in nearest]
