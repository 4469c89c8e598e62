"""URIs: the kind of source, its place, its settings."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_files import write_images, write_pairs, write_texts
from PIL import Image

from harmony.data.settings import DataConfig
from harmony.data.sources import KINDS, SourceOptions, open_source, parse_uri
from harmony.data.sources.base import spread, words_of
from harmony.errors import UserError


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("shards:a/b-{00..11}.tar", ("shards", "a/b-{00..11}.tar", {})),
        ("shards:a-?.tar", ("shards", "a-?.tar", {})),
        ("shards:a-?.tar?caption_key=title", ("shards", "a-?.tar", {"caption_key": "title"})),
        ("table:C:/x.csv?images=/a%20b&caption_key=t", ("table", "C:/x.csv", {"images": "/a b", "caption_key": "t"})),
        ("folder:what?really", ("folder", "what?really", {})),
        ("scenes:", ("scenes", "", {})),
        ("scenes:?split=val&count=5", ("scenes", "", {"split": "val", "count": "5"})),
    ],
)
def test_uris_are_taken_apart(uri: str, parts: tuple[str, str, dict[str, str]]) -> None:
    assert parse_uri(uri) == parts


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("shard:x.tar", "unknown kind of data 'shard'; did you mean 'shards'"),
        ("data/train.tar", "does not say what kind of data it is; write shards:data/train.tar"),
        ("pairs.csv", "write table:pairs.csv"),
        ("pictures", "write folder:pictures"),
        ("a/instances.json", "write coco:a/instances.json"),
        ("a.npz", "write npz:a.npz"),
        ("", "does not say what kind"),
        ("folder:/nowhere/at/all", "/nowhere/at/all is not there"),
        ("table:/nowhere/a.csv", "/nowhere/a.csv is not there"),
        ("folder:", "names no folder"),
        (f"folder:{__file__}", "names a file, not a folder"),
    ],
)
def test_uris_that_name_nothing_say_what_to_write(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(uri)


def test_settings_in_a_uri_come_before_those_of_the_recipe(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    write_texts(tmp_path, {"a.json": '{"title": "from title", "alt": "from alt"}'})
    options = DataConfig(caption_key="alt").options
    assert options == SourceOptions(caption_key="alt")
    assert open_source(f"folder:{tmp_path}", options)[0].captions == ["from alt"]
    assert open_source(f"folder:{tmp_path}?caption_key=title", options)[0].captions == ["from title"]


def test_an_unknown_setting_suggests_the_nearest(tmp_path: Path) -> None:
    uri = write_pairs(tmp_path, 2)
    with pytest.raises(UserError, match=r"unknown setting in a data URI 'captionkey'; did you mean 'caption_key'"):
        open_source(f"{uri}?captionkey=x".replace("captionkey", "captionkey"))


def test_every_kind_can_be_opened(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "classed/x/a.png", "images/a.png", "masks/a.png"])
    Image.new("L", (40, 32)).save(tmp_path / "masks" / "a.png")
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 4, 4, 3), dtype=np.uint8))
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a picture"}]}
    write_texts(
        tmp_path,
        {
            "a.txt": "a picture",
            "t.csv": "image,caption\na.png,a picture\n",
            "c.json": json.dumps(coco),
            "f.token": "a.png#0\ta picture\n",
        },
    )
    with_captions = {
        "shards": write_pairs(tmp_path / "shards", 1),
        "table": f"table:{tmp_path}/t.csv",
        "folder": f"folder:{tmp_path}?image_key=png",
        "coco": f"coco:{tmp_path}/c.json",
        "flickr": f"flickr:{tmp_path}/f.token?images={tmp_path}",
        "scenes": "scenes:?count=1",
    }
    without = {
        "npz": f"npz:{tmp_path}/a.npz",
        "torchvision": f"torchvision:ImageFolder?root={tmp_path}/classed",
        "masks": f"masks:{tmp_path}?classes=2",
    }
    assert {*with_captions, *without} == set(KINDS)
    for kind, uri in (with_captions | without).items():
        source = open_source(uri)
        assert source.uri == uri
        assert len(source) == (4 if kind == "folder" else 1)
        assert source[0].key == source.key(0)
        assert pickle.loads(pickle.dumps(source))[0].key == source.key(0)
        if kind in with_captions:
            source.require_captions()
        else:
            with pytest.raises(UserError, match=r"no example of .* has a caption"):
                source.require_captions()


def test_captions_come_from_texts_and_lists_of_texts_only() -> None:
    assert words_of(" two  words\n") == ["two words"]
    assert words_of(["a", "", None, 3, ["b"], "c"]) == ["a", "c"]
    assert words_of(None) == words_of(3) == words_of({"a": "b"}) == words_of(b"bytes") == words_of("") == []


@pytest.mark.parametrize(("count", "wanted"), [(0, 5), (5, 5), (5, 9), (1000, 7), (3068, 1000)])
def test_spread_indices_are_distinct_and_reach_over_everything(count: int, wanted: int) -> None:
    chosen = spread(count, wanted)
    assert len(set(chosen)) == len(chosen) == min(count, wanted)
    if chosen:
        gaps = [after - before for before, after in zip([*chosen], [*chosen[1:], count], strict=True)]
        assert chosen[0] == 0
        assert max(gaps) - min(gaps) <= 1
