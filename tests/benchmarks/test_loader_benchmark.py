"""The benchmark of the loader runs, in small, and tells what it says it tells."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.loader import WAYS, Bench, main
from benchmarks.photographs import write_shard
from harmony import recipe as recipes
from harmony.data.decode import decode
from harmony.data.sources import open_source

SMALL = ("views.global.size=32", "views.local.size=16", "views.local.count=2", "model.image.name=vit_tiny_patch16_224")


def test_every_way_is_measured_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        wanted = [
            "--images",
            "8",
            "--batch",
            "4",
            "--rounds",
            "1",
            "--size",
            "90x70",
            "--device",
            "cpu",
            "--steps",
            "2",
        ]
        main([*SMALL, *wanted, "--consume", "1000", "--workers", "1", "--out", str(tmp_path / "x" / "loader.json")])
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "x" / "loader.json").read_text())
    assert list(result["ways"]) == list(WAYS)
    assert result["crops"] == {"global": [2, 32], "local": [2, 16]}
    plain = result["ways"]["plain"]
    assert plain["times_plain"] == 1
    for way in ("worker", "device"):
        found = result["ways"][way]
        assert found["times_plain"] == pytest.approx(
            found["images_per_second_per_core"] / plain["images_per_second_per_core"]
        )
        changed = {"colours changed"} if way == "worker" else set()
        assert set(found["milliseconds_by_part"]) == changed | {
            *("read", "decode", "boxes", "crops", "captions", "masks", "colours drawn", "rest")
        }
        assert min(found["milliseconds_by_part"].values()) >= 0
    assert [(one["way"], one["wanted"]) for one in result["fed"]] == [("worker", 1000), ("device", 1000)]
    assert all(0 <= one["waiting"] <= 1 and one["pairs_per_second"] <= 1000 for one in result["fed"])
    table = capsys.readouterr().out
    assert all(f"| {way} |" in table for way in WAYS)


def test_the_plain_way_gives_the_crops_that_ours_gives(tmp_path: Path) -> None:
    """The same number and size of crops, about as bright and as various, whatever the chance of each."""
    uri = write_shard(tmp_path, 24, (96, 72))
    bench = Bench(recipes.load("harmony", [f"data.train={uri}", *SMALL]), open_source(uri), 24, torch.device("cpu"))
    plain, tokens = bench.plain.batch(range(24))
    ours = next(bench.loader("worker").batches())
    assert tokens.shape == (24, 77)
    for name, crops in ours.images.items():
        theirs = torch.stack(plain[name])
        assert theirs.shape == crops.shape
        assert abs(theirs.mean() - crops.mean()) < 0.25  # in units of the normalised pixels, whose deviation is 1
        assert abs(theirs.std() - crops.std()) < 0.25


def test_what_is_made_is_as_large_as_a_photograph(tmp_path: Path) -> None:
    uri = write_shard(tmp_path, 2)
    source = open_source(uri)
    assert write_shard(tmp_path, 2) == uri  # and is kept
    for i in range(2):
        data = source[i].image
        assert isinstance(data, bytes)
        assert 50_000 < len(data) < 150_000  # of ImageNet's files of 500 x 375 px, most are
        assert decode(data).shape == (3, 375, 500)
        assert source[i].captions
    assert not isinstance(source[0].image, Image.Image)
