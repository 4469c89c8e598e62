"""Token ids equal open_clip's, with either end for captions that are too long."""

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmony.data.captions import Tokenizer

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
