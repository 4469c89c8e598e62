"""Which patches a word is similar to, for runs trained to align the two (FILIP, arXiv 2111.07783, section 4.4).

Shapes: B images, T tokens of a caption, N patches, h x w of them, S px a side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony.data.captions import Tokenizer
from harmony.evaluation.encoders import TowersEncoder
from harmony.evaluation.report.attention import heat
from harmony.evaluation.report.html import Html, Section, joined, picture, tag
from harmony.evaluation.report.pictures import LARGEST, data_uri

WORDS = 5
"""Words that are shown of a caption: those to which its patches differ most in similarity."""


@torch.no_grad()
def word_maps(encoder: TowersEncoder, pixels: Tensor, caption: str) -> list[tuple[str, Tensor]]:
    """Each word of a caption with the cosine of every patch, (h, w); of a word of several tokens, their mean.

    Args:
        encoder: with a text tower.
        pixels: (3, S, S) normalised.
        caption: words beyond the tower's context are left out.
    """
    towers, text = encoder.towers, encoder.recipe.model.text
    assert towers.text is not None and text is not None
    tokenizer = Tokenizer(text.context, text.truncation)
    ids = tokenizer.encode([caption])
    tokens = F.normalize(towers.text.read(ids.to(encoder.device)).embed_words()[0].float(), dim=-1)  # (T, E)
    patches = F.normalize(towers.image.encode(pixels[None].to(encoder.device)).embed_patches()[0].float(), dim=-1)
    cosines = (tokens @ patches.T).cpu().unflatten(1, towers.image.grid(pixels.shape[-1]))
    return [(word, cosines[places].mean(dim=0)) for word, places in tokenizer.words(ids[0].tolist())]


def alignment_section(
    encoder: TowersEncoder, model: str, portraits: Tensor, captions: Sequence[Sequence[str]], global_trained: bool
) -> list[Section]:
    """Images beside a map for each of a few words; nothing where no image has a caption.

    Args:
        encoder: whose towers are shown.
        model: what they are called, student or teacher.
        portraits: (B, 3, S, S) uint8.
        captions: of each image; the first is taken.
        global_trained: whether an objective trains the one vector a side that zero_shot and retrieval compare.
    """
    rows = []
    for image, own in zip(portraits, captions, strict=True):
        maps = word_maps(encoder, encoder.normalise(image), own[0]) if own else []
        if maps:
            rows.append(_row(image, own[0], maps))
    if not rows:
        return []
    lead = (
        f"The cosine between each patch and single words of the image's caption, in the {model}: dark is least, bright "
        f"is most. The words are the {WORDS} to which patches differ most, and share the scale of an image; point at a "
        "map to read its range. This is what filip trains. The numbers of zero_shot and retrieval compare one vector a "
        "side instead, the class token and the end of the caption, "
        + (
            "which another objective of this recipe trains along."
            if global_trained
            else "which no objective of this recipe trains: they say little of this model."
        )
    )
    return [Section("alignment", "Which patches a word finds", joined(rows), lead)]


def _row(image: Tensor, caption: str, maps: Sequence[tuple[str, Tensor]]) -> Html:
    chosen = sorted(range(len(maps)), key=lambda place: -float(maps[place][1].std(correction=0)))[:WORDS]
    every = torch.stack([maps[place][1] for place in chosen])
    low, high = (float(every.quantile(share)) for share in (0.01, 0.99))
    shown = [_tile(picture(data_uri(image, LARGEST), "validation image"), "image")]
    for word, cosines in (maps[place] for place in sorted(chosen)):
        says = f"{word}: cosines from {float(cosines.min()):.2f} to {float(cosines.max()):.2f}"
        uri = data_uri(heat(cosines, LARGEST, low, high))
        shown.append(_tile(picture(uri, f"patches similar to {word}", title=says), word))
    return joined([tag("p", caption), tag("div", *shown, class_="heads")])


def _tile(image: Html, says: str) -> Html:
    return tag("figure", image, tag("figcaption", says), class_="tile")
