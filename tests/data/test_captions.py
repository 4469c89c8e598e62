"""Token ids equal open_clip's, with either end for captions that are too long."""

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.chance import Chance
from harmony.data.captions import CaptionAugment, Tokenizer

captions = st.lists(st.text(max_size=60), min_size=1, max_size=4)


@given(captions, st.integers(3, 40))
def test_ids_equal_those_of_open_clip(texts: list[str], context: int) -> None:
    expected = open_clip.tokenize(texts, context)
    ids = Tokenizer(context).encode(texts)
    length = ids.shape[1]
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected[:, :length])
    assert not expected[:, length:].any()


@given(captions)
def test_rows_are_as_long_as_the_longest_caption(texts: list[str]) -> None:
    ids = Tokenizer().encode(texts)
    ends = (ids == Tokenizer.end).float().argmax(1)
    assert ids.shape[1] == int(ends.max()) + 1 == min(77, max(Tokenizer().lengths(texts)))
    assert (ids[:, 0] == Tokenizer.begin).all()


def test_a_long_caption_keeps_its_end_or_loses_it_as_published() -> None:
    long = "one two three four five six seven eight"
    kept, cut = (Tokenizer(6, truncation).encode([long])[0] for truncation in ("keep_end", "cut"))
    whole = Tokenizer().encode([long])[0]
    assert kept.tolist() == [*whole[:5].tolist(), Tokenizer.end]
    assert cut.tolist() == whole[:6].tolist()
    short = Tokenizer(6, "cut").encode(["one two"])
    assert short.tolist() == Tokenizer(6).encode(["one two"]).tolist()


def test_an_exclamation_mark_is_a_word_although_its_id_is_zero() -> None:
    assert Tokenizer().encode(["!=", "a long row of words"])[0].tolist()[:4] == [Tokenizer.begin, 0, 284, Tokenizer.end]
    assert Tokenizer().decode([Tokenizer.begin, 0, 284, Tokenizer.end, 0, 0]) == "!="


def test_nothing_encodes_to_nothing() -> None:
    assert Tokenizer().encode([]).shape == (0, 0)
    assert Tokenizer().encode([""]).tolist() == [[Tokenizer.begin, Tokenizer.end]]


@pytest.mark.parametrize("text", ["a dog on the beach .", "two cats ! !"])
def test_ids_read_back_as_words(text: str) -> None:
    assert (
        Tokenizer().decode(Tokenizer().encode([text, text * 3])[0].tolist()).split()
        == text.replace("! !", "! !").split()
    )


# Changed captions


def chance(examples: int, epoch: int = 0) -> Chance:
    return Chance.of_examples(0, epoch, torch.arange(examples))


WORDS = st.sampled_from(["a", "red", "dog", "on", "the", "grass"])
SENTENCES = st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=6)


@given(SENTENCES, st.floats(0, 1), st.floats(0, 1))
def test_words_are_left_out_or_change_places_and_never_new(texts: list[str], delete: float, swap: float) -> None:
    changed = CaptionAugment(delete=delete, swap=swap).apply(texts, chance(len(texts)))
    for before, after in zip(texts, changed, strict=True):
        left = before.split()
        for word in after.split():
            left.remove(word)
        assert bool(before) is bool(after), "one word always stays"


@given(SENTENCES)
def test_each_caption_is_changed_by_its_own_chance_alone(texts: list[str]) -> None:
    augment, streams = CaptionAugment(delete=0.3, swap=0.5), chance(len(texts))
    together = augment.apply(texts, streams)
    for place, text in enumerate(texts):
        assert augment.apply([text], Chance(streams.keys[place : place + 1])) == together[place : place + 1]


def test_shares_are_those_that_were_asked_for() -> None:
    many, text = chance(4000), " ".join(map(str, range(10)))
    shorter = CaptionAugment(delete=0.1).apply([text] * 4000, many)
    assert sum(len(row.split()) for row in shorter) / 4000 == pytest.approx(9, abs=0.05)
    assert all(row.split() == sorted(row.split(), key=int) for row in shorter), "deletion keeps the order"
    moved = [row.split() for row in CaptionAugment(swap=0.2).apply([text] * 4000, many)]
    assert all(sorted(row, key=int) == text.split() for row in moved), "swaps keep the words"
    # Each of two swaps leaves a word of ten where it is with probability 0.82; the second undoes the first in 0.0036.
    assert sum(row[0] == "0" for row in moved) / 4000 == pytest.approx(0.82**2 + 0.0036, abs=0.025)
    assert shorter != CaptionAugment(delete=0.1).apply([text] * 4000, chance(4000, epoch=1)), "each epoch anew"


def test_nothing_asked_for_changes_nothing() -> None:
    assert CaptionAugment().apply(["a red dog", "one", ""], chance(3)) == ["a red dog", "one", ""]
    assert CaptionAugment(delete=1.0).apply(["one"], chance(1)) == ["one"]
