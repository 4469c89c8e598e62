"""Captions as token ids: open_clip's byte-pair tokenizer, its vocabulary of 49,408 entries; and their words changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harmony.chance import Chance


@cache
def _byte_pairs() -> Any:
    """The tokenizer proper, read from open_clip's package once a process."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@dataclass(frozen=True)
class Tokenizer:
    """Turns captions into rows of token ids: begin, words, end, then zeros.

    Attributes:
        context: most tokens a caption may have, begin and end included.
        truncation: what becomes of a longer caption. `keep_end`: it is cut and its last token replaced by the end
            token. `cut`: it is cut and loses its end token, as the published code does it.
        vocabulary: number of token ids.
        begin, end: the ids of the tokens around a caption; `end` is the largest id. Note that 0, the padding, is also
            the id of "!" at the beginning of a word.
    """

    context: int = 77
    truncation: Literal["keep_end", "cut"] = "keep_end"
    vocabulary: ClassVar[int] = 49408
    begin: ClassVar[int] = 49406
    end: ClassVar[int] = 49407

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token ids of B captions: (B, T) int64, T the longest caption's length, zero behind a caption's end."""
        rows = [self._row(caption) for caption in captions]
        ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without begin, end and what follows."""
        words = list(ids)
        words = words[: words.index(self.end)] if self.end in words else words
        return str(_byte_pairs().decode([word for word in words if word != self.begin])).strip()

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The words of one row of ids before its end, each with the places of its tokens."""
        found: list[tuple[str, list[int]]] = []
        inside = False
        for place, token in enumerate(ids):
            if token == self.end:
                break
            if token == self.begin:
                continue
            piece = str(_byte_pairs().decode([int(token)]))
            text, places = found.pop() if inside else ("", [])
            found.append((text + piece.strip(), [*places, place]))
            inside = not piece.endswith(" ")  # the last token of a word carries the gap behind it
        return found

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has, begin and end included, before it is cut to the context."""
        return [len(_byte_pairs().encode(caption)) + 2 for caption in captions]

    def _row(self, caption: str) -> list[int]:
        row = [self.begin, *_byte_pairs().encode(caption), self.end]
        if len(row) > self.context:
            row = row[: self.context]
            if self.truncation == "keep_end":
                row[-1] = self.end
        return row


_Share = Annotated[float, Field(ge=0, le=1)]


class CaptionAugment(BaseModel):
    """Random swap and random deletion of words (EDA, arXiv 1901.11196, section 2), the swaps first.

    Words are what spaces separate. EDA makes several copies of a text, one operation each; here every reading of a
    caption is one draw of both. A caption of one word stays as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    delete: Annotated[_Share, Field(description="probability of each word to be left out; one word always stays")] = 0.0
    swap: Annotated[_Share, Field(description="swaps of two random words, as a share of the number of words")] = 0.0

    def apply(self, captions: Sequence[str], chance: Chance) -> list[str]:
        """The B captions, each changed by its own example's chance."""
        words = [caption.split() for caption in captions]
        longest = max(map(len, words), default=0)
        most = round(self.swap * longest)
        swapped = chance.uniform("caption/swap", most, 2).double().tolist()
        deleted = (chance.uniform("caption/delete", longest) < self.delete).tolist()
        spared = chance.uniform("caption/spare").double().tolist()
        changed = []
        for row, pairs, gone, one in zip(words, swapped, deleted, spared, strict=True):
            for first, second in pairs[: round(self.swap * len(row))]:
                a, b = int(first * len(row)), int(second * len(row))
                row[a], row[b] = row[b], row[a]
            kept = [word for word, leave in zip(row, gone, strict=False) if not leave]
            changed.append(" ".join(kept or row[int(one * len(row)) :][:1]))
        return changed
