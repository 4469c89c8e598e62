"""The benchmark of the evaluation runs, in small, and what it reports adds up."""

import json

import pytest
import torch

from benchmarks import evaluation
from benchmarks.tiny import TINY_HARMONY
from harmony.evaluation.linear_data import Inputs
from harmony.evaluation.logistic import Problem


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("evaluation") / "evaluation.json"
    threads = torch.get_num_threads()
    try:
        features = ["--images=6", "--batch=3", "--rounds=1", "--size", "90x70", "64x48", "--arch=vit_tiny_patch16_224"]
        grid = ["--examples", "60", "120", "--classes=3", "--width=6"]
        overrides = [override for override in TINY_HARMONY if "objectives" not in override]
        evaluation.main(["all", *overrides, *features, *grid, "--device=cpu", f"--json={out}"])
    finally:
        torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_extraction_is_told_beside_the_forward_pass_and_by_part(found: dict):
    assert [one["jpegs"] for one in found["features"]] == ["90x70", "64x48"]
    for one in found["features"]:
        assert one["of_forward_speed"] == pytest.approx(
            one["extraction_images_per_s"] / one["forward_images_per_s"], rel=1e-6
        )
        parts = ("read", "decode", "resize, cut", "normalise", "forward", "keep", "store", "rest")
        assert set(one["milliseconds_by_part"]) == set(parts)
        assert min(one["milliseconds_by_part"].values()) >= 0
        assert one["images"] == 6


def test_the_grid_has_forty_settings_whose_passes_are_counted(found: dict):
    for one, examples in zip(found["linear"], (60, 120), strict=True):
        settings = one["settings"]
        assert len(settings) == 40
        assert [setting["width"] for setting in settings[::10]] == [6, 12, 24, 30]
        assert all(setting["iterations"] <= setting["passes"] for setting in settings)
        assert one["passes_per_setting"] * 40 == pytest.approx(sum(setting["passes"] for setting in settings))
        on_rest = sum(4 * (setting["width"] + 1) * setting["passes"] for setting in settings) * 3 * 0.9 * examples
        assert one["flops"] > 0.95 * on_rest  # and those of the chosen setting on all
        assert one["preparing_s"] + one["fitting_s"] < one["search_s"] < one["s"]
        times = 1_281_167 * 1000 / (3 * examples)
        assert one["imagenet_extrapolated"]["s"] == pytest.approx(one["flops"] / one["flops_per_s"] * times)


def test_classes_of_the_features_drawn_can_be_told_apart_but_not_fully():
    drawn, kind, learned, other = evaluation.drawn(1500, 5, 64), Inputs(1, "cls"), slice(600), slice(600, None)
    solution = Problem(kind.of(drawn.cls, drawn.patches, learned), drawn.labels[learned], 5).solve(0.01)
    right = solution.scores(kind.of(drawn.cls, drawn.patches, other)).argmax(1) == drawn.labels[other]
    assert 0.3 < right.double().mean() < 0.98
