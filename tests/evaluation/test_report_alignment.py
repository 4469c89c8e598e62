"""Which patches a word finds: the words of a caption, their maps, and the section of the report."""

import pytest
import torch
import torch.nn.functional as F
from browser import parsed
from runs_for_evaluation import saved_run, tiny_recipe

from harmony.data.captions import Tokenizer
from harmony.evaluation.encoders import load_run
from harmony.evaluation.report import write_report
from harmony.evaluation.report.alignment import WORDS, alignment_section, word_maps

FILIP = (
    "objectives={filip: {}, dino: null, ibot: null, mae: null, mlm: null, text_distillation: null}",
    "views.local=null",
)


@pytest.mark.parametrize("caption", ["a red circle", "an antidisestablishmentarianism, twice!", "Grün & blau", ""])
def test_words_are_those_of_the_caption(caption: str):
    tokenizer = Tokenizer()
    ids = tokenizer.encode([caption + " x"])[0].tolist()
    words = tokenizer.words([*ids, 0, 0])
    assert [place for _, places in words for place in places] == list(range(1, len(ids) - 1))
    assert "".join(word for word, _ in words) == (caption + "x").lower().replace(" ", "")


def test_a_map_is_the_cosine_of_every_patch_and_a_word_of_several_tokens_their_mean(tmp_path):
    encoder = load_run(str(saved_run(tmp_path / "run", tiny_recipe()).folder), "teacher", "cpu")
    pixels, tokenizer = torch.randn(3, 48, 48), Tokenizer(24)
    caption = "a antidisestablishmentarianism circle"
    maps = word_maps(encoder, pixels, caption)
    assert [word for word, _ in maps] == caption.split()
    towers, ids = encoder.towers, tokenizer.encode([caption])
    patches = encoder.shared(encoder.encode(pixels[None], 1).layers[-1].patches)[
        0
    ]  # (E, h, w), as segmentation has them
    tokens = towers.text.read(ids).tokens[0]
    embedded = towers.text.transformer.ln_final(tokens) @ towers.text.transformer.text_projection
    cosines = torch.stack([F.cosine_similarity(patches, token[:, None, None], dim=0) for token in embedded])
    assert cosines.shape[0] > 6
    for found, expected in zip(maps, (cosines[1], cosines[2:-2].mean(0), cosines[-2]), strict=True):
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)


def test_the_report_of_a_filip_run_shows_words_and_says_what_its_numbers_compare(tmp_path):
    run = saved_run(tmp_path / "run", tiny_recipe(*FILIP))
    page = parsed(write_report(run.folder).read_text(encoding="utf-8"))
    assert "Which patches a word finds" in page.headings
    shown = [image["alt"] for image in page.named("img") if image.get("alt", "").startswith("patches similar to")]
    assert 6 <= len(shown) <= 6 * WORDS
    assert "another objective of this recipe trains along" in page.text
    encoder = load_run(str(run.folder), "teacher", "cpu")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    [section] = alignment_section(encoder, "teacher", images, [[], ["a <b>red</b> circle"]], global_trained=False)
    assert "they say little of this model" in section.lead
    assert section.body.count("<p>") == 1 and "&lt;b&gt;" in section.body
    assert alignment_section(encoder, "teacher", images, [[], []], global_trained=True) == []
