"""Retrieval: the image of a caption among all images, and a caption of an image among all captions.

- text to image: each caption is a query of its own, and its own image is the one right answer.
- image to text: each image is a query, and any of its captions is right; the best placed one counts.

Captions that are equal word for word cannot be told apart by any encoder, and are handled as follows. Image to text:
a caption with the same words as one of the image's own is right too, whichever image it came with. Text to image: the
own image stays the only right answer, as is the field's custom, so that where several images share a caption even a
perfect encoder stays below 1; `duplicate_captions` is the share of captions this concerns.
Ties count against (see `ranking`). Shapes: I images, C captions, U different texts, E shared width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harmony.errors import UserError
from harmony.evaluation.ranking import best_ranks, chance_recall, median, recall
from harmony.evaluation.results import Outcome
from harmony.evaluation.task import Card, Setup

DEPTHS = (1, 5, 10)
EXAMPLES = 6
"""Best and worst queries kept for the report."""


def missing(setup: Setup) -> str | None:
    """Why this data or encoder has no retrieval; None when it has."""
    if not setup.encoder.reads_text:
        return "retrieval needs a text tower, and this model was trained on images alone"
    if not setup.data.has_captions():
        return _no_captions(setup)
    return None


def card(setup: Setup) -> Card:
    """The protocol."""
    most = setup.config.retrieval.captions
    return Card(
        resolution=f"{setup.size} px, the central square of the image",
        split=f"nothing is learned; measured on every captioned example of {setup.shown(setup.data)}",
        selection="none",
        optimiser="none",
        schedule=f"{'all' if most is None else f'the first {most}'} captions of an image; no prompt, no re-ranking",
        differs="a caption of the same words counts as right for an image whichever image it came with; ties count as "
        "wrong, so that a collapsed encoder finds nothing",
    )


def _no_captions(setup: Setup) -> str:
    return f"no example of {setup.data.uri} has a caption; retrieval needs image-caption pairs"


def run(setup: Setup) -> Outcome:
    """Measure.

    Raises:
        UserError: no example has a caption.
    """
    features = setup.features(setup.data)
    images = features.images()
    pool = Pool.of(images.captions, setup.config.retrieval.captions)
    if not len(pool.owner):
        raise UserError(_no_captions(setup))
    pictures = images.embeddings[pool.images]
    texts = features.texts(pool.texts)
    ranks = text_to_image_ranks(pictures, texts, pool, setup.encoder.device)
    metrics = measure(ranks, image_to_text_ranks(pictures, texts, pool, setup.encoder.device), pool)
    metrics |= {"without_caption": len(images.captions) - len(pool.images), "bad_examples": len(images.bad)}
    places = images.indices[pool.images]
    return Outcome(metrics, {"text_to_image": examples(pictures, texts, pool, ranks, places)})


@dataclass(frozen=True)
class Pool:
    """The images that have captions, and their captions.

    Attributes:
        images: (I,) positions of these images among all that were encoded.
        texts: the U different captions.
        text: (C,) each caption's position in `texts`.
        owner: (C,) each caption's position in `images`, ascending.
    """

    images: Tensor
    texts: list[str]
    text: Tensor
    owner: Tensor

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]], most: int | None = None) -> "Pool":
        """From the captions of each image, of which at most the first `most` are used."""
        used = [list(own)[:most] for own in captions]
        images = [i for i, own in enumerate(used) if own]
        texts: dict[str, int] = {}
        text = [texts.setdefault(caption, len(texts)) for i in images for caption in used[i]]
        owner = [place for place, i in enumerate(images) for _ in used[i]]
        return cls(torch.tensor(images), list(texts), torch.tensor(text), torch.tensor(owner))

    @property
    def copies(self) -> Tensor:
        """(U,) how many captions have each text."""
        return torch.bincount(self.text, minlength=len(self.texts))

    @property
    def right_texts(self) -> tuple[Tensor, Tensor]:
        """(P,) images and (P,) texts of the pairs that belong together, each once."""
        image, text = torch.stack([self.owner, self.text]).unique(dim=1)
        return image, text

    @property
    def shared(self) -> Tensor:
        """(C,) bool, captions whose text another image has as well."""
        return torch.bincount(self.right_texts[1], minlength=len(self.texts))[self.text] > 1


def text_to_image_ranks(images: Tensor, texts: Tensor, pool: Pool, device: torch.device | str = "cpu") -> Tensor:
    """(C,) the rank of each caption's own image, from embeddings (I, E) and (U, E) of unit length."""
    # Equal captions of different images are one query each; every pair of an image and a text is ranked only once.
    image, text = pool.right_texts
    ranks = best_ranks(texts[text], images, (torch.arange(len(text)), image), device=device)
    place = torch.searchsorted(image * len(pool.texts) + text, pool.owner * len(pool.texts) + pool.text)
    return ranks[place]


def image_to_text_ranks(images: Tensor, texts: Tensor, pool: Pool, device: torch.device | str = "cpu") -> Tensor:
    """(I,) the rank of each image's best placed caption, from embeddings (I, E) and (U, E) of unit length."""
    return best_ranks(images, texts, pool.right_texts, pool.copies, device)


def measure(text_to_image: Tensor, image_to_text: Tensor, pool: Pool) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank in both directions, with chance levels."""
    captions, images = len(pool.owner), len(pool.images)
    image, text = pool.right_texts
    right = torch.zeros(images, dtype=torch.int64).scatter_add_(0, image, pool.copies[text])
    metrics: dict[str, float] = {}
    for k in DEPTHS:
        metrics[f"text_to_image_recall@{k}"] = recall(text_to_image, k)
        metrics[f"image_to_text_recall@{k}"] = recall(image_to_text, k)
        metrics[f"chance_text_to_image_recall@{k}"] = min(1.0, k / images)
        metrics[f"chance_image_to_text_recall@{k}"] = chance_recall(right, captions, k)
    metrics["text_to_image_median_rank"] = median(text_to_image)
    metrics["image_to_text_median_rank"] = median(image_to_text)
    metrics["duplicate_captions"] = pool.shared.double().mean().item()
    return metrics | {"images": images, "captions": captions}


def examples(images: Tensor, texts: Tensor, pool: Pool, ranks: Tensor, places: Tensor) -> dict[str, Any]:
    """The best and the worst captions as queries, each with the five images that come first.

    Args:
        images: (I, E), of unit length.
        texts: (U, E), likewise.
        pool: what belongs to what.
        ranks: (C,) text-to-image ranks.
        places: (I,) the images' positions in the source.
    """
    own = torch.cat(
        [(images[o] * texts[t]).sum(1) for o, t in zip(pool.owner.split(65536), pool.text.split(65536), strict=True)]
    )
    best_first = sorted(range(len(ranks)), key=lambda c: (int(ranks[c]), -float(own[c])))
    shown = {"best": _different(best_first, pool), "worst": _different(best_first[::-1], pool)}
    return {
        kind: [_example(caption, images, texts, pool, ranks, places) for caption in captions]
        for kind, captions in shown.items()
    }


def _different(captions: Sequence[int], pool: Pool) -> list[int]:
    """The first few captions of different images and with different words."""
    taken: list[int] = []
    images, texts = set(), set()
    for caption in captions:
        image, text = int(pool.owner[caption]), int(pool.text[caption])
        if image not in images and text not in texts:
            taken.append(caption)
            images.add(image)
            texts.add(text)
        if len(taken) == EXAMPLES:
            break
    return taken


def _example(caption: int, images: Tensor, texts: Tensor, pool: Pool, ranks: Tensor, places: Tensor) -> dict[str, Any]:
    text = int(pool.text[caption])
    similarity = images @ texts[text]
    first = similarity.topk(min(5, len(images)))
    return {
        "caption": pool.texts[text],
        "image": int(places[pool.owner[caption]]),
        "rank": int(ranks[caption]),
        "pool": len(images),
        "first": [
            {"image": int(places[i]), "similarity": round(float(s), 4)}
            for s, i in zip(first.values, first.indices, strict=True)
        ],
    }
