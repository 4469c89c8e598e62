"""Images and labels in NumPy arrays."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from data_files import python_objects

from harmony.data.sources import open_source
from harmony.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)


def save(folder: Path, **arrays: object) -> Path:
    path = folder / "a.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("column", [False, True])  # MedMNIST writes labels as a column
def test_a_split_has_its_images_labels_and_names(tmp_path: Path, column: bool) -> None:
    labels = np.array([2, 0, 1])
    path = save(
        tmp_path,
        train_images=IMAGES,
        train_labels=np.zeros(5),
        test_images=IMAGES[:3],
        test_labels=labels[:, None] if column else labels,
        class_names=np.array(["cat", "dog", "owl"]),
    )
    source = open_source(f"npz:{path}?split=test")
    assert len(source) == 3
    assert source.class_names == ["cat", "dog", "owl"]
    assert [source[i].label for i in range(3)] == [2, 0, 1]
    assert [source.key(i) for i in range(3)] == ["test-000000", "test-000001", "test-000002"]
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(source[i].image), IMAGES[i])
    with pytest.raises(IndexError):
        source[3]


def test_plain_arrays_need_no_split_and_grey_ones_no_colour(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["a", "b"]')
    source = open_source(f"npz:{save(tmp_path, images=IMAGES[..., 0], labels=np.array([0, 1, -1, 1, 0]))}")
    assert [source[i].label for i in range(5)] == [0, 1, None, 1, 0]
    assert source.class_names == ["a", "b"]
    assert np.asarray(source[4].image).shape == (8, 6)
    assert source.fingerprint() != open_source(f"npz:{save(tmp_path, images=IMAGES[:2, ..., 0])}").fingerprint()


def test_images_without_labels_are_data_too(tmp_path: Path) -> None:
    source = open_source(f"npz:{save(tmp_path, images=IMAGES)}")
    assert not source.has_labels()
    assert source[0].label is None


def test_a_copy_reads_its_own(tmp_path: Path) -> None:
    source = open_source(f"npz:{save(tmp_path, train_images=IMAGES, train_labels=np.arange(5))}")
    sent = pickle.dumps(source)
    assert len(sent) < 1000  # the images are not in it
    copy = pickle.loads(sent)
    assert copy[3].label == 3
    np.testing.assert_array_equal(np.asarray(copy[3].image), IMAGES[3])


def test_nothing_grows_with_the_images(tmp_path: Path) -> None:
    counts = []
    for name, copies in (("few", 1), ("many", 100)):
        (tmp_path / name).mkdir()
        images = IMAGES.repeat(copies, axis=0)
        path = save(tmp_path / name, images=images, labels=np.zeros(len(images)))
        counts.append(python_objects(open_source(f"npz:{path}")))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("arrays", "query", "message"),
    [
        (
            {"train_images": IMAGES, "test_images": IMAGES},
            "",
            "has the splits test, train; choose one with .split=test",
        ),
        ({"train_images": IMAGES}, "?split=tran", "has no split 'tran'; choose one of train"),
        ({"train_images": IMAGES}, "?slit=train", "did you mean 'npz.split'"),
        ({"x": IMAGES, "y": IMAGES}, "", "neither images nor SPLIT_images: saw x, y"),
        ({"images": IMAGES / 255}, "", "is float64; give uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "", r"has the shape \(5, 3, 8, 6\); give \(N, H, W, 3\)"),
        ({"images": IMAGES[:0]}, "", "holds no image"),
        ({"images": IMAGES, "labels": np.arange(4)}, "", r"has the shape \(4,\) beside 5 images"),
        ({"images": IMAGES, "labels": np.zeros((5, 14))}, "", "several labels an image are not supported"),
        ({"images": IMAGES, "labels": np.full(5, 0.5)}, "", "no class index"),
        ({"images": IMAGES, "labels": np.full(5, -2)}, "", "no class index"),
        ({"images": np.array([{}, None])}, "", "cannot be read as npz .*pickle"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, arrays: dict[str, object], query: str, message: str) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(UserError, match=message):
        open_source(f"npz:{path}{query}")


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", IMAGES)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    whole = save(tmp_path, images=IMAGES).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 3
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    for name, message in (
        ("one.npy", "is a single array"),
        ("text.npz", "cannot be read as npz"),
        ("empty.npz", "cannot be read as npz"),
        ("flipped.npz", "cannot be read as npz"),
        ("cut.npz", "cannot be read as npz"),
        ("none.npz", "is not there"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(f"npz:{tmp_path / name}")


def test_the_real_set(shared: Path) -> None:
    path = shared / "data" / "classification" / "cifar10_subset.npz"
    for split, count in (("train", 3000), ("test", 1000)):
        source = open_source(f"npz:{path}?split={split}")
        labels = np.array([source[i].label for i in range(len(source))])
        assert len(source) == count
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert source.class_names is not None and source.class_names[0] == "airplane"
