"""The data sets of torchvision.datasets, written in their real formats."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from data_files import picture, png, write_images
from torchvision import datasets

from harmony.data.sources import BadExample, open_source
from harmony.errors import UserError


def write_mnist(root: Path, count: int = 3) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, first in (("train", 0), ("t10k", 5)):
        pixels = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2) + first
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 2, 2) + pixels.tobytes())
        labels = bytes(first + i for i in range(count))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    write_images(folder / "images", ["Abyssinian_1.jpg", "great_pyrenees_7.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\n")
    (folder / "annotations" / "test.txt").write_text("great_pyrenees_7 2 2 1\nAbyssinian_1 1 1 1\n")


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR-10 with one batch a split; its checksums are those of what is written here."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    lists = {}
    for name, rows in (("data_batch_1", data[:1]), ("test_batch", data)):
        content = pickle.dumps({"data": rows, "labels": [3, 1][: len(rows)]})
        (folder / name).write_bytes(content)
        lists[name] = [[name, hashlib.md5(content).hexdigest()]]
    content = pickle.dumps({"label_names": ["airplane", "automobile", "bird", "cat"]})
    (folder / "batches.meta").write_bytes(content)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists["data_batch_1"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists["test_batch"])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return data


def test_sets_that_ask_for_train(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    train = open_source(f"torchvision:MNIST?root={tmp_path}&split=train")
    test = open_source(f"torchvision:MNIST?root={tmp_path}&split=test")
    assert [train[i].label for i in range(3)] == [0, 1, 2]
    assert [test[i].label for i in range(3)] == [5, 6, 7]
    assert np.asarray(test[1].image).tolist() == [[9, 10], [11, 12]]
    assert train.key(2) == "MNIST-000002"
    assert train.fingerprint() != test.fingerprint()
    with pytest.raises(IndexError):
        train[3]


def test_a_stamp_sees_a_file_that_was_replaced(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    uri = f"torchvision:MNIST?root={tmp_path}&split=test"
    before = open_source(uri).stamp()
    assert open_source(uri).stamp() == before
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    moved = labels.stat().st_mtime_ns + 1
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([0]))
    os.utime(labels, ns=(0, moved))
    assert open_source(uri).stamp() != before


def test_the_pixels_of_cifar_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cifar(tmp_path, monkeypatch)
    source = open_source(f"torchvision:CIFAR10?root={tmp_path}&split=test")
    assert [source[i].label for i in range(2)] == [3, 1]
    np.testing.assert_array_equal(np.asarray(source[1].image), data[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert source.class_names == ["airplane", "automobile", "bird", "cat"]
    assert len(open_source(f"torchvision:CIFAR10?root={tmp_path}&split=train")) == 1


def test_sets_that_ask_for_a_split(tmp_path: Path) -> None:
    write_pets(tmp_path)
    source = open_source(f"torchvision:OxfordIIITPet?root={tmp_path}&split=test")
    assert source.class_names == ["Great Pyrenees", "Abyssinian"] or source.class_names == [
        "Abyssinian",
        "Great Pyrenees",
    ]
    assert [source[i].label for i in range(2)] == [1, 0]
    assert source.has_labels()
    assert len(open_source(f"torchvision:OxfordIIITPet?root={tmp_path}&split=trainval")) == 1


def test_other_arguments_are_handed_on_as_what_they_are(tmp_path: Path) -> None:
    labels = tmp_path / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    write_images(tmp_path / "dtd" / "dtd" / "images", ["polka_dotted/a.jpg", "zigzagged/b.jpg"])
    (labels / "val1.txt").write_text("polka_dotted/a.jpg\n")
    (labels / "val3.txt").write_text("polka_dotted/a.jpg\nzigzagged/b.jpg\n")
    source = open_source(f"torchvision:DTD?root={tmp_path}&split=val&partition=3")
    assert len(source) == 2
    assert source.class_names == ["polka dotted", "zigzagged"]
    assert len(open_source(f"torchvision:DTD?root={tmp_path}&split=val")) == 1
    with pytest.raises(UserError, match="partition must be a whole number, not 'x'"):
        open_source(f"torchvision:DTD?root={tmp_path}&split=val&partition=x")


def test_folders_of_classes_and_damaged_files(tmp_path: Path) -> None:
    write_images(tmp_path, ["b/1.png", "a/2.png"])
    (tmp_path / "b" / "0.png").write_bytes(png(0)[:60])
    source = open_source(f"torchvision:ImageFolder?root={tmp_path}")
    assert source.class_names == ["a", "b"]
    assert source[0].label == 0
    np.testing.assert_array_equal(np.asarray(source[0].image), np.asarray(picture(1)))
    with pytest.raises(BadExample, match="ImageFolder-000001: cannot be read"):
        source[1]


def test_a_copy_opens_the_set_itself(tmp_path: Path) -> None:
    write_mnist(tmp_path, count=40)
    source = open_source(f"torchvision:MNIST?root={tmp_path}&split=test")
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert pickle.loads(sent)[2].label == 7


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("torchvision:CIFAR?root={}", "unknown data set of torchvision 'CIFAR'; did you mean 'CIFAR10"),
        ("torchvision:cifar10?root={}", "did you mean 'CIFAR10"),
        ("torchvision:MNIST", r"does not say where the data is; write torchvision:MNIST\?root=FOLDER"),
        ("torchvision:MNIST?root={}/no", "there is no folder .*/no"),
        ("torchvision:MNIST?root={}", "splits train and test; choose one"),
        ("torchvision:MNIST?root={}&split=val", "splits train and test; choose one"),
        ("torchvision:Food101?root={}", "Food101 has several splits; choose one"),
        ("torchvision:Food101?root={}&split=val", "cannot be opened .*'val'.*train"),
        ("torchvision:MNIST?root={}&split=test", "MNIST is not in .* as torchvision lays it out"),
        ("torchvision:CIFAR10?root={}&split=test", "CIFAR10 is not in .* as torchvision lays it out"),
        (
            "torchvision:DTD?root={}&split=val&partion=3",
            "unknown setting of torchvision:DTD 'partion'; did you mean 'part",
        ),
        ("torchvision:DTD?root={}&split=val&download=true", "unknown setting of torchvision:DTD 'download'"),
        ("torchvision:ImageFolder?root={}", "cannot be opened"),
        ("torchvision:wrap_dataset_for_transforms_v2?root={}", "unknown data set of torchvision"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(uri.format(tmp_path))


def test_sets_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_pets(tmp_path)
    write_images(tmp_path / "oxford-iiit-pet" / "annotations" / "trimaps", ["Abyssinian_1.png", "great_pyrenees_7.png"])
    with pytest.raises(UserError, match="gives no class an image"):
        open_source(f"torchvision:OxfordIIITPet?root={tmp_path}&split=test&target_types=segmentation")


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"x"))
    for name in ("MNIST", "CIFAR100", "Food101", "Flowers102"):
        with pytest.raises(UserError, match="as torchvision lays it out"):
            open_source(f"torchvision:{name}?root={tmp_path}&split=train")
