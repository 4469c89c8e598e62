"""Tables of images: the same examples from every format, and clear words when there are none."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_files import encoded, picture, png, python_objects, write_images

from harmony.data.sources import BadExample, SourceOptions, open_source
from harmony.data.sources.tables import TableSource
from harmony.errors import UserError

FORMATS = ["csv", "tsv", "jsonl", "parquet"]
Rows = Sequence[dict[str, Any]]


def write_table(path: Path, rows: Rows) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path, [f"images/{number}.png" for number in range(4)])


CAPTIONS = ["a, b and c", "NA", '12 "inches"', "two\nlines"]
ROWS = [
    {"id": number, "image": f"images/{number}.png", "caption": caption, "label": label}
    for number, (caption, label) in enumerate(zip(CAPTIONS, (2, 0, 1, 2), strict=True))
]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_examples(folder: Path, form: str) -> None:
    source = TableSource(str(write_table(folder / f"pairs.{form}", ROWS)))
    assert len(source) == 4
    for number, example in enumerate(source[i] for i in range(4)):
        assert example.key == source.key(number) == f"images/{number}.png"
        assert example.image == png(number)
        assert example.captions == [" ".join(CAPTIONS[number].split())]
        assert example.label == ROWS[number]["label"]
    assert source.class_names is None
    assert source.problems() == []
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_one_image_are_one_example_with_several_captions(folder: Path, form: str) -> None:
    order = [2, 0, 2, 1, 0, 2]
    rows = [{"path": f"images/{number}.png", "text": f"text {place}"} for place, number in enumerate(order)]
    source = TableSource(str(write_table(folder / f"pairs.{form}", rows)))
    assert [source.key(i) for i in range(3)] == ["images/2.png", "images/0.png", "images/1.png"]
    assert [source[i].captions for i in range(3)] == [["text 0", "text 2", "text 5"], ["text 1", "text 4"], ["text 3"]]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_of_captions(folder: Path, form: str) -> None:
    rows = [
        {"file_name": "images/0.png", "captions": ["one", " ", "two"]},
        {"file_name": "images/1.png", "captions": []},
    ]
    source = TableSource(str(write_table(folder / f"pairs.{form}", rows)))
    assert [source[i].captions for i in range(2)] == [["one", "two"], []]


@pytest.mark.parametrize("form", FORMATS)
def test_columns_may_be_named(folder: Path, form: str) -> None:
    rows = [{"image": "nowhere.png", "caption": "wrong", "Bild": "images/1.png", "Titel": "ein Bild", "Art": "Hund"}]
    path = write_table(folder / f"pairs.{form}", [*rows, {**rows[0], "Bild": "images/2.png", "Art": "Esel"}])
    source = open_source(f"table:{path}", SourceOptions(image_key="Bild", caption_key="Titel", label_key="Art"))
    assert source[0].image == png(1)
    assert source[0].captions == ["ein Bild"]
    assert source.class_names == ["Esel", "Hund"]
    assert [source[i].label for i in range(2)] == [1, 0]


@pytest.mark.parametrize("form", FORMATS)
def test_missing_columns_list_those_seen(folder: Path, form: str) -> None:
    path = write_table(folder / f"pairs.{form}", [{"Bild": "images/1.png", "Titel": "ein Bild"}])
    with pytest.raises(UserError, match=r"has no column with images: saw Bild, Titel; .*data\.image_key"):
        TableSource(str(path))
    with pytest.raises(UserError, match=r"unknown column of pairs.* 'titel'; did you mean 'Titel'"):
        TableSource(str(path), SourceOptions(image_key="Bild", caption_key="titel"))
    with pytest.raises(UserError, match=r"looked in the columns captions, .*, and saw column 'Titel'; name the right"):
        TableSource(str(path), SourceOptions(image_key="Bild")).require_captions()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("column", ["url", "image"])
def test_links_are_refused_with_advice(folder: Path, form: str, column: str) -> None:
    path = write_table(folder / f"pairs.{form}", [{column: "https://example.org/a.jpg", "caption": "a"}])
    with pytest.raises(UserError, match="lists links, not files; download them first"):
        TableSource(str(path))


def test_names_of_columns_are_found_whatever_their_case_and_the_best_first(folder: Path) -> None:
    path = write_table(
        folder / "x.csv", [{"URL": "http://x", "TEXT": "text", "Caption": "right", "FilePath": "images/0.png"}]
    )
    example = TableSource(str(path))[0]
    assert example.captions == ["right"]
    assert example.key == "images/0.png"


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_a_csv_may_use_other_delimiters_and_blanks_around_names(folder: Path, delimiter: str) -> None:
    lines = [["image_name", " comment"], ["images/0.png", " a dog"], ["images/1.png ", " a cat"]]
    (folder / "x.csv").write_text("\n".join(delimiter.join(line) for line in lines))
    source = TableSource(str(folder / "x.csv"), SourceOptions(caption_key="comment"))
    assert [source[i].captions for i in range(2)] == [["a dog"], ["a cat"]]
    assert source[1].image == png(1)


def test_a_byte_order_mark_is_no_part_of_the_first_name(folder: Path) -> None:
    (folder / "x.csv").write_text("image,caption\nimages/0.png,a\n", encoding="utf-8-sig")
    assert TableSource(str(folder / "x.csv"))[0].captions == ["a"]


def test_damaged_lines_are_left_out_and_counted(folder: Path) -> None:
    good = [f"images/{number}.png,text {number}" for number in range(3)]
    (folder / "x.csv").write_text("\n".join(["image,caption", good[0], "a,b,c,d", good[1], "lonely", good[2]]))
    lines = [json.dumps({"image": f"images/{number}.png", "caption": f"text {number}"}) for number in range(3)]
    (folder / "x.jsonl").write_text("\n".join([lines[0], '{"image": "images/', "[1]", "", lines[1], lines[2]]))
    for form in ("csv", "jsonl"):
        source = TableSource(str(folder / f"x.{form}"))
        assert [source[i].captions for i in range(3)] == [["text 0"], ["text 1"], ["text 2"]]
        assert source.problems() == [f"x.{form}: damaged lines (left out): 2"]


@pytest.mark.parametrize("form", FORMATS)
def test_rows_without_an_image_are_left_out_and_counted(folder: Path, form: str) -> None:
    rows = [
        {"image": name, "caption": f"text {n}"} for n, name in enumerate(["images/0.png", "", "images/1.png", None])
    ]
    source = TableSource(str(write_table(folder / f"x.{form}", rows)))
    assert [source[i].captions for i in range(len(source))] == [["text 0"], ["text 2"]]
    assert source.problems() == ["rows that name no image (left out): 2"]


@pytest.mark.parametrize("form", FORMATS)
def test_missing_images_are_bad_examples_but_all_missing_is_an_error(folder: Path, form: str) -> None:
    rows = [{"image": f"images/{number}.png", "caption": "a"} for number in (0, 77)]
    source = TableSource(str(write_table(folder / f"x.{form}", rows)))
    assert source[0].image == png(0)
    with pytest.raises(BadExample, match=r"images/77.png: cannot be read: No such file"):
        source[1]
    with pytest.raises(UserError, match=r"are not there: looked for .*images/77.png; .*\?images=FOLDER"):
        TableSource(str(write_table(folder / f"y.{form}", rows[1:])))


def test_images_may_lie_in_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("tables")
    path = write_table(elsewhere / "x.csv", ROWS)
    assert open_source(f"table:{path}?images={folder}")[3].image == png(3)
    absolute = [{**row, "image": str(folder / row["image"])} for row in ROWS]
    assert TableSource(str(write_table(elsewhere / "y.csv", absolute)))[3].image == png(3)


@pytest.mark.parametrize("form", FORMATS)
def test_several_tables_follow_each_other(folder: Path, form: str) -> None:
    for part in range(2):
        write_table(folder / f"part-{part}.{form}", ROWS[2 * part : 2 * part + 2])
    source = TableSource(f"{folder}/part-{{0..1}}.{form}")
    assert [source[i].captions for i in range(4)] == [[" ".join(caption.split())] for caption in CAPTIONS]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"image,caption", "is no table that can be read; use one of .csv"),
        ("x.csv", b"", "has no columns; is it empty"),
        ("x.csv", b"image,caption\n", "has no rows with an image"),
        ("x.csv", b"image,caption\nimages/0.png,caf\xe9\n", "cannot be read as csv in UTF-8"),
        ("x.csv", b"im\xe9ge,caption\n", "cannot be read as csv in UTF-8"),
        ("x.jsonl", b"", "has no columns"),
        ("x.jsonl", b"not json\n", "has no line that is a JSON object"),
        ("x.parquet", b"PAR1 but not really", "cannot be read as parquet"),
    ],
)
def test_what_is_no_table_is_refused(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        TableSource(str(folder / name))


@pytest.mark.parametrize("nested", [False, True])
def test_images_embedded_in_parquet(tmp_path: Path, nested: bool) -> None:
    images = [encoded(picture(number)) for number in range(150)]
    column = [{"bytes": image, "path": None} for image in images] if nested else images
    for part in range(2):
        rows = {
            "image": column[75 * part : 75 * part + 75],
            "caption": [f"text {n}" for n in range(75 * part, 75 * part + 75)],
        }
        pa.parquet.write_table(pa.table(rows), tmp_path / f"part-{part}.parquet", row_group_size=20)
    source = open_source(f"table:{tmp_path}/part-*.parquet")
    assert len(source) == 150
    for i in (0, 74, 75, 149, 20):
        assert source[i].image == images[i]
        assert source[i].captions == [f"text {i}"]
        assert source[i].key == f"row {i + 1}"
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet", ".arrow"}


def test_embedded_images_are_unpacked_anew_when_the_table_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for number in (1, 2):
        pa.parquet.write_table(pa.table({"image": [png(number)] * number, "caption": ["a"] * number}), path)
        source = TableSource(str(path))
        assert len(source) == number
        assert source[0].image == png(number)
    (tmp_path / "x.parquet.index.arrow").write_bytes(b"broken")
    assert TableSource(str(path))[1].image == png(2)


def test_an_embedded_image_may_be_missing(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(0), None]), "caption": ["a", "b"]})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    source = TableSource(str(tmp_path / "x.parquet"))
    with pytest.raises(BadExample, match="row 2: has no image in the table"):
        source[1]


def test_no_room_for_embedded_images_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa.parquet.write_table(pa.table({"image": [png(0)], "caption": ["a"]}), tmp_path / "x.parquet")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match=r"cannot be unpacked .*XDG_CACHE_HOME"):
            TableSource(str(tmp_path / "x.parquet"))
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("form", FORMATS)
def test_the_fingerprint_tells_other_data(folder: Path, form: str) -> None:
    path = write_table(folder / f"x.{form}", ROWS)
    before = TableSource(str(path)).fingerprint()
    assert TableSource(str(path)).fingerprint() == before
    (folder / "images/2.png").write_bytes(png(2) + b"more")
    changed = TableSource(str(path)).fingerprint()
    assert changed != before
    write_table(path, ROWS[:-1])
    assert TableSource(str(path)).fingerprint() not in (before, changed)


@pytest.mark.parametrize("form", FORMATS)
def test_the_index_holds_no_python_object_a_row(folder: Path, form: str) -> None:
    def source(count: int) -> TableSource:
        rows = [
            {"image": f"images/{n % 4}.png{'' if n < 4 else n}", "caption": f"text {n}", "label": n % 3}
            for n in range(count)
        ]
        return TableSource(str(write_table(folder / f"{count}.{form}", rows)))

    small, large = source(6), source(600)
    assert len(large) == 600
    assert python_objects(large) == python_objects(small)


def test_a_label_may_be_missing(folder: Path) -> None:
    rows = [{**ROWS[0], "label": ""}, {**ROWS[1], "label": "dog"}, {**ROWS[2], "label": "cat"}]
    source = TableSource(str(write_table(folder / "x.csv", rows)))
    assert source.class_names == ["cat", "dog"]
    assert [source[i].label for i in range(3)] == [None, 1, 0]
