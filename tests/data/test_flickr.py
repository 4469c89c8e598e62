"""Caption files of Flickr8k, Flickr30k and COCO in their usual forms."""

import json
import pickle
from pathlib import Path

import pytest
from data_files import encoded, picture, png, python_objects, write_images, write_tar, write_texts

from harmony.data.sources import open_source
from harmony.errors import UserError

NAMES = ["1_a.jpg", "2_b.jpg", "3_c.jpg"]

TOKENS = "1_a.jpg#0\tA dog , running .\n1_a.jpg#1\tOne  dog\n3_c.jpg#0\tA cat\n2_b.jpg#0\tA bird\n"
CAPTIONS = 'image,caption\n1_a.jpg,"A dog , running ."\n1_a.jpg,One dog\n3_c.jpg,A cat\n2_b.jpg,A bird\n'
UNQUOTED = "image,caption\n1_a.jpg,A dog , running .\n1_a.jpg,One dog\n3_c.jpg,A cat\n2_b.jpg,A bird\n"
RESULTS = (
    "image_name| comment_number| comment\n"
    "1_a.jpg| 0| A dog , running .\n1_a.jpg| 1| One dog\n3_c.jpg| 0| A cat\n2_b.jpg| 0| A bird\n"
)
FOUND = {"1_a.jpg": ["A dog , running .", "One dog"], "3_c.jpg": ["A cat"], "2_b.jpg": ["A bird"]}


def karpathy(*images: tuple[str, str, list[str]], **more: str) -> str:
    listed = [
        {"filename": name, "split": split, "sentences": [{"raw": raw, "tokens": []} for raw in raws], **more}
        for name, split, raws in images
    ]
    return json.dumps({"dataset": "flickr30k", "images": listed})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("Flickr8k.token.txt", TOKENS),
        ("results_20130124.token", TOKENS),
        ("captions.txt", CAPTIONS),
        ("captions.txt", UNQUOTED),
        ("captions.txt", "\ufeff" + UNQUOTED.replace("\n", "\r\n")),
        ("results.csv", RESULTS),
        ("k.json", karpathy(*[(name, "train", texts) for name, texts in FOUND.items()])),
    ],
)
def test_every_form_says_the_same(tmp_path: Path, file: str, text: str) -> None:
    write_images(tmp_path / "pictures", NAMES)
    (tmp_path / file).write_bytes(text.encode())
    source = open_source(f"flickr:{tmp_path / file}?images={tmp_path / 'pictures'}")
    assert {source.key(i): source[i].captions for i in range(len(source))} == FOUND
    assert [source.key(i) for i in range(3)] == list(FOUND)
    assert source[2].image == encoded(picture(1), "JPEG")
    assert source.problems() == []
    source.require_captions()
    with pytest.raises(IndexError):
        source[3]


def test_quotes_within_quotes(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    write_texts(tmp_path, {"c.txt": 'image,caption\na.jpg,"He says ""hi"" , twice"\nb.jpg,"x" and "y" \n'})
    source = open_source(f"flickr:{tmp_path}/c.txt")
    assert source[0].captions == ['He says "hi" , twice']


@pytest.mark.parametrize("place", ["Images", "Flicker8k_Dataset", "flickr30k-images", "."])
def test_images_are_found_beside_the_file(tmp_path: Path, place: str) -> None:
    write_images(tmp_path / place, NAMES)
    write_texts(tmp_path, {"t.token": TOKENS})
    assert len(open_source(f"flickr:{tmp_path}/t.token")) == 3


def test_images_in_a_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "i.tar", [(f"flickr/{name}", png(number)) for number, name in enumerate(NAMES)])
    write_texts(tmp_path, {"t.token": TOKENS})
    source = open_source(f"flickr:{tmp_path}/t.token?images=i.tar")  # beside the file, for it is not here
    assert [bytes(source[i].image) for i in range(3)] == [png(0), png(2), png(1)]
    assert pickle.loads(pickle.dumps(source))[1].captions == ["A cat"]


def test_splits_of_karpathys_json(tmp_path: Path) -> None:
    images = [("1_a.jpg", "train", ["a"]), ("2_b.jpg", "restval", ["b"]), ("3_c.jpg", "test", ["c", "d"])]
    write_images(tmp_path / "val2014", NAMES)
    write_texts(tmp_path, {"k.json": karpathy(*images, filepath="val2014")})
    uri = f"flickr:{tmp_path}/k.json"
    assert open_source(f"{uri}?split=test")[0].captions == ["c", "d"]
    assert open_source(f"{uri}?split=test").key(0) == "val2014/3_c.jpg"
    assert len(open_source(f"{uri}?split=train,restval")) == 2
    assert len(open_source(uri)) == 3
    assert open_source(f"{uri}?split=test").fingerprint() != open_source(uri).fingerprint()
    with pytest.raises(UserError, match="has no split 'valid'; choose one of restval, test, train"):
        open_source(f"{uri}?split=valid")
    # The same file serves where the images lie without the folder, as in COCO's 2017 release.
    (tmp_path / "val2014").rename(tmp_path / "all")
    assert open_source(f"{uri}?split=test&images={tmp_path}/all").key(0) == "3_c.jpg"


def test_a_list_of_names_is_a_split(tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    write_texts(tmp_path, {"t.token": TOKENS, "test.txt": "3_c.jpg\n1_a\n9_z.jpg\n", "none.txt": "9_z.jpg\n"})
    source = open_source(f"flickr:{tmp_path}/t.token?names=test.txt")
    assert [source.key(i) for i in range(len(source))] == ["1_a.jpg", "3_c.jpg"]
    assert source.problems() == ["names in test.txt without captions (left out): 1, as 9_z.jpg"]
    with pytest.raises(UserError, match="names none of the images"):
        open_source(f"flickr:{tmp_path}/t.token?names=none.txt")
    with pytest.raises(UserError, match="is not there; correct names="):
        open_source(f"flickr:{tmp_path}/t.token?names=nowhere.txt")
    with pytest.raises(UserError, match="has no splits; leave out split="):
        open_source(f"flickr:{tmp_path}/t.token?split=test")


def test_absent_images_and_odd_lines_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, NAMES[:1])
    # The second kind of line is in Flickr30k's own results.csv, the first in Flickr8k's.
    text = RESULTS + "2258277193_586949ec62.jpg.1| 0| people\n2199200615.jpg| 4   A dog runs\n1_a.jpg| 2| \n\n"
    write_texts(tmp_path, {"results.csv": text})
    source = open_source(f"flickr:{tmp_path}/results.csv")
    assert [source[i].captions for i in range(len(source))] == [FOUND["1_a.jpg"]]
    assert source.problems() == [
        "lines without a name or a caption (left out): 2, as line 7",
        "images that are not there (left out): 3, as 3_c.jpg",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TOKENS, "none of the 3 images .* looked for 1_a.jpg; say where they are with .images=FOLDER"),
        ("a,b,c\n1,2,3\n", "begins with 'a,b,c', which is no list of captions; give NAME#0"),
        ("", "begins with '', which is no list of captions"),
        ("image,caption\n", "has no image with a caption"),
        ('{"images": [', "is no json"),
        ('{"images": [{"id": 1}], "annotations": []}', "for COCO's own files write coco:"),
        ('{"a": 1}', "has no list 'images' with 'sentences'"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    write_images(tmp_path, ["other.jpg"])
    write_texts(tmp_path, {"captions": text})
    with pytest.raises(UserError, match=message):
        open_source(f"flickr:{tmp_path}/captions")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t.token is not there"):
        open_source(f"flickr:{tmp_path}/t.token")
    write_texts(tmp_path, {"t.token": TOKENS})
    (tmp_path / "latin.txt").write_bytes("image,caption\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="nowhere is not there"):
        open_source(f"flickr:{tmp_path}/t.token?images={tmp_path}/nowhere")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        open_source(f"flickr:{tmp_path}/latin.txt")


def test_nothing_grows_with_the_images(tmp_path: Path) -> None:
    counts = []
    for count in (3, 200):
        names = [f"{count}_{i}.jpg" for i in range(count)]
        folder = tmp_path / str(count)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        write_texts(folder, {"t.token": "".join(f"{name}#{k}\tcaption {k}\n" for name in names for k in range(5))})
        counts.append(python_objects(open_source(f"flickr:{folder}/t.token")))
    assert counts[0] == counts[1]


def test_the_real_captions_come_through_every_form(shared: Path, tmp_path: Path) -> None:
    real = open_source(f"shards:{shared}/data/captions/flickr8k/val-00000.tar")
    few = [real[i] for i in range(0, len(real), 50)]
    lines = [(f"{example.key}.jpg", k, text) for example in few for k, text in enumerate(example.captions)]
    texts = {
        "t.token": "".join(f"{name}#{k}\t{text}\n" for name, k, text in lines),
        "captions.txt": "image,caption\n" + "".join(f"{name},{text}\n" for name, _, text in lines),
        "results.csv": "image_name| comment_number| comment\n" + "".join(f"{n}| {k}| {t}\n" for n, k, t in lines),
    }
    write_texts(tmp_path, texts)
    for file in texts:
        uri = f"flickr:{tmp_path / file}?images={shared}/data/captions/flickr8k/val-00000.tar"
        source = open_source(uri)
        assert [source[i].captions for i in range(len(source))] == [example.captions for example in few]
        assert [source[i].image for i in range(len(source))] == [example.image for example in few]
