"""Features on disk: extracted once, and anew as soon as anything that they are made from is another."""

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import plain_metrics as plain
import pytest
import safetensors.torch
import torch
from PIL import Image
from processes import Processes
from runs_for_evaluation import saved_run, tiny_recipe

from harmony import ranks
from harmony.data.sources import BadExample, open_source
from harmony.errors import UserError
from harmony.evaluation import store, tasks
from harmony.evaluation.encoders import TowersEncoder, load_encoder
from harmony.evaluation.features import Features
from harmony.evaluation.settings import EvaluationConfig
from harmony.training import distributed

COLOURS = [i % 7 for i in range(23)]


class Counting(plain.ColourEncoder):
    """Counts what it is shown, in all instances together."""

    images = texts_read = 0

    def encode(self, pixels, layers=0):
        Counting.images += len(pixels)
        return super().encode(pixels, layers)

    def texts(self, texts):
        Counting.texts_read += len(texts)
        return super().texts(texts)


@pytest.fixture(autouse=True)
def _count_from_zero(monkeypatch):
    Counting.images = Counting.texts_read = 0
    small_shards(monkeypatch)


def small_shards(patch):
    """So that 23 examples are 5 shards."""
    patch.setattr(store, "SMALLEST", 5)
    patch.setattr(store, "WANTED", 1000)


def features(source=None, encoder=None, max_pixels=2**26, **settings):
    config = EvaluationConfig(**{"workers": 0, "batch_size": 3} | settings)
    return Features(encoder or Counting(), source or plain.Colours(COLOURS), config, max_pixels)


def same(one, other):
    return (
        all(
            getattr(one, name).equal(getattr(other, name))
            for name in ("embeddings", "cls", "patches", "indices", "labels")
        )
        and one.captions == other.captions
        and one.bad == other.bad
    )


def files(cache_home, pattern="*.safetensors"):
    return sorted((cache_home / "harmony" / "features").glob(f"*/{pattern}"))


def test_what_was_extracted_is_not_extracted_again(cache_home, capsys):
    source = plain.Colours(COLOURS, bad=[1, 5, 6, 7, 8, 9])  # the whole second shard is bad
    first = features(source).images()
    assert Counting.images == 17
    assert [path.name[:5] for path in files(cache_home)] == ["00000", "00001", "00002", "00003", "00004"]
    assert "kept in" in capsys.readouterr().err
    second = features(source).images()
    assert Counting.images == 17
    assert same(first, second)
    told = capsys.readouterr().err
    assert f"features of colours:: taken from {files(cache_home)[0].parent}" in told
    assert "6 examples of colours: cannot be read" in told
    assert "encoding" not in told


def test_what_is_kept_is_what_would_be_extracted(cache_home):
    source = plain.Colours(COLOURS, bad=[4, 17])
    features(source).images()
    kept, anew = features(source).images(), features(source, features=None, batch_size=23).images()
    assert same(kept, anew)
    assert len(kept) == len(kept.labels) == 21
    assert kept.embeddings.dtype == kept.cls.dtype == torch.float32
    assert len(files(cache_home)) == 5  # features=null has left nothing more


def test_texts_are_read_once(cache_home):
    texts = ["a red hat", "blue", "a red hat", "green tea", "blue", "a most purple prose", "white", "black"]
    first = features().texts(texts)
    assert Counting.texts_read == 6
    assert features().texts(texts).equal(first)
    assert features().texts(texts[::-1]).equal(first.flip(0))
    assert Counting.texts_read == 6
    features().texts([*texts, "yellow"])
    assert Counting.texts_read == 13
    assert features().texts([]).shape == (0, 7)


class Other(Counting):
    """As if of other weights."""

    def fingerprint(self):
        return "others"


class Stamped(plain.Colours):
    """As if a file had been written again."""

    def stamp(self):
        return "others"


def normalised(encoder):
    encoder.mean = (0.4, 0.4, 0.3)
    return encoder


@pytest.mark.parametrize(
    "asked",
    [
        {"encoder": Other()},
        {"encoder": normalised(Counting())},
        {"source": Stamped(COLOURS)},
        {"source": plain.Colours(COLOURS, names=plain.NAMES[::-1])},
        {"max_examples": 22},
        {"size": 16},
        {"precision": "bf16"},
        {"max_pixels": 40 * 30},
    ],
    ids=["weights", "normalisation", "stamp", "class names", "examples", "size", "precision", "pixels"],
)
def test_other_weights_data_or_preprocessing_are_extracted_anew(asked):
    features().images()
    before = Counting.images
    features(**asked).images()
    assert Counting.images > before
    features().images()
    features(**asked).images()
    assert Counting.images == before + min(23, asked.get("max_examples", 23))  # each is kept beside the other


def test_settings_that_change_nothing_use_the_same():
    features().images()
    features(batch_size=7, max_examples=100).images()
    assert Counting.images == 23


class Stopped(BaseException):
    """What a signal or Ctrl-C does."""


def test_an_interrupted_extraction_goes_on_from_the_shards_that_are_whole(cache_home, capsys):
    class Tiring(Counting):
        def fingerprint(self):
            return "tiring"

        def encode(self, pixels, layers=0):
            if Counting.images > 12:
                raise Stopped
            return super().encode(pixels, layers)

    class Rested(Counting):
        def fingerprint(self):
            return "tiring"

    with pytest.raises(Stopped):
        features(encoder=Tiring()).images()
    assert len(files(cache_home)) == 2
    Counting.images = 0
    capsys.readouterr()
    whole = features(encoder=Rested()).images()
    assert Counting.images == 13
    assert "going on with 2 of 5 shards done" in capsys.readouterr().err.replace("\n", " ")
    assert same(whole, features(features=None).images())


@pytest.mark.parametrize("damage", ["cut", "half a header", "empty", "noise", "of another key", "a folder"])
def test_a_damaged_shard_is_noticed_and_made_anew(cache_home, damage, capsys):
    features().images()
    path = files(cache_home)[2]
    data = path.read_bytes()
    if damage == "of another key":
        safetensors.torch.save_file(safetensors.torch.load(data), path, {"key": "another"})
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": data[:-7], "half a header": data[:60], "empty": b"", "noise": b"noise" * 90}[damage])
    Counting.images = 0
    found = features().images()
    assert Counting.images == 5
    assert same(found, features(features=None).images())
    if damage != "of another key":
        assert f"{path} is damaged" in capsys.readouterr().err
    if damage != "a folder":
        assert path.read_bytes() == data


def test_an_example_that_can_be_read_again_is_taken_in():
    class Network(plain.Colours):
        down = True

        def __getitem__(self, i):
            if self.down and i in (2, 3):
                raise BadExample(self.key(i), "cannot be read: the server does not answer")
            return super().__getitem__(i)

    source = Network(COLOURS)
    assert len(features(source).images().bad) == 2
    assert len(features(source).images()) == 21
    assert Counting.images == 21
    source.down = False
    assert not features(source).images().bad
    assert Counting.images == 21 + 5  # the shard that they are in


def test_where_nothing_can_be_written_all_goes_on_in_memory(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "deeper", Path("/proc/nowhere")):
        found = features(features=str(folder)).images()
        assert same(found, features(features=None).images())
        told = capsys.readouterr().err
        assert told.count("they stay in memory") == 1
        assert str(folder) in told
    assert (tmp_path / "taken").read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_whole_shards_and_nothing_else(cache_home, monkeypatch, capsys, number):
    save, saved = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        save(tensors, path, metadata)
        saved.append(path)
        if len(saved) > 2:
            os.truncate(path, 100)
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: (os error {number})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    found = features().images()
    assert len(saved) == 3
    told = capsys.readouterr().err
    assert told.count("the disk is full") == 1
    assert len(files(cache_home)) == 2
    assert len(files(cache_home, "*")) + len(files(cache_home, ".*")) == 3  # with about.json
    assert same(found, features(features=None).images())


def test_a_disk_without_room_is_seen_before_it_is_filled(cache_home, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    assert len(features().images()) == 23
    assert "they stay in memory" in capsys.readouterr().err
    assert not files(cache_home)


def test_what_killed_processes_left_is_swept(cache_home):
    features().images()
    folder = files(cache_home)[0].parent
    for name, age in ((".00000-of-00005.safetensors.123", 2 * 24 * 3600), (".00001-of-00005.safetensors.124", 60)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, ((folder / "about.json").stat().st_mtime - age,) * 2)
    files(cache_home)[0].unlink()
    features().images()
    assert [path.name for path in files(cache_home, ".*")] == [".00001-of-00005.safetensors.124"]


def test_people_can_read_what_a_folder_holds(cache_home):
    features(max_examples=4).images()
    about = json.loads(files(cache_home, "about.json")[0].read_text())
    assert (about["model"], about["data"], about["size"]) == ("colour encoder", "colours:", 8)
    assert (about["encoded"], about["examples"]) == (4, 23)


def test_a_folder_of_ones_own(tmp_path, cache_home):
    features(features=str(tmp_path / "mine")).images()
    assert len(list((tmp_path / "mine").glob("*/*.safetensors"))) == 5
    assert not files(cache_home)


def test_features_are_mapped_and_not_read(cache_home):
    """A column that nobody looks at takes no memory: its pages are not resident."""
    features().images()
    images = features(plain.Colours(COLOURS)).images()
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in files(cache_home))
    assert images.shards[0]["cls"].shape == (5, 2, 7)


@pytest.mark.parametrize("count", [0, 1, 5, 4999, 50_000, 1_281_167])
def test_shards_are_as_long_as_the_number_of_examples_says(monkeypatch, count):
    monkeypatch.undo()
    parts = store.spans(count)
    assert [i for part in parts for i in (part.start, part.stop)] == sorted(
        [0] * bool(count) + [part.stop for part in parts] + [part.start for part in parts[1:]]
    )
    assert all(part.stop - part.start <= store.LARGEST for part in parts)
    assert (parts[-1].stop if parts else 0) == count
    assert len(parts) == {0: 0, 1: 1, 5: 1, 4999: 5, 50_000: 32, 1_281_167: 79}[count]


# Sources: what has changed in them is seen


def changed(stamp, change):
    """The stamp before and after, on a clock that surely has moved."""
    before = stamp()
    path = change()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return before != stamp()


def picture(path, colour="red"):
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def test_a_folder_that_has_changed(tmp_path):
    (tmp_path / "f").mkdir()
    picture(tmp_path / "f" / "a.bmp")
    (tmp_path / "f" / "a.txt").write_text("one red square")
    uri = f"folder:{tmp_path}/f"
    stamp = lambda: open_source(uri).stamp()  # noqa: E731
    assert stamp() == stamp()
    assert changed(stamp, lambda: picture(tmp_path / "f" / "a.bmp", "blue"))  # of the same size
    assert changed(stamp, lambda: rewritten(tmp_path / "f" / "a.txt", "two red square"))
    assert open_source(uri).stamp() != open_source(f"{uri}?caption_key=txt").stamp()


def rewritten(path, text):
    path.write_text(text)
    return path


def test_a_table_that_has_changed(tmp_path):
    picture(tmp_path / "a.bmp")
    table = tmp_path / "t.csv"
    table.write_text("image,caption,label,other\na.bmp,a red,1,2\n")
    uri = f"table:{table}"
    stamp = lambda: open_source(uri).stamp()  # noqa: E731
    assert stamp() == stamp()
    assert changed(stamp, lambda: picture(tmp_path / "a.bmp", "blue"))
    assert changed(stamp, lambda: rewritten(table, "image,caption,label,other\na.bmp,a red,2,1\n"))
    assert open_source(uri).stamp() != open_source(f"{uri}?label_key=other").stamp()


def test_a_shard_that_has_changed(tmp_path):
    def shard(label):
        rewritten(tmp_path / "0.cls", label)
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(picture(tmp_path / "0.bmp"), "0.bmp")
            tar.add(tmp_path / "0.cls", "0.cls")
        return tmp_path / "x.tar"

    shard("3")
    uri = f"shards:{tmp_path}/x.tar"
    fingerprint = open_source(uri).fingerprint()
    stamp = lambda: open_source(uri).stamp()  # noqa: E731
    assert changed(stamp, lambda: shard("5"))
    assert open_source(uri)[0].label == 5
    assert open_source(uri).fingerprint() == fingerprint  # which is why there are stamps
    assert open_source(uri).stamp() != open_source(f"{uri}?label_key=txt").stamp()


def caption_file(folder, images):
    return rewritten(folder / "c.txt", "".join(f"{name}#0\tone\n" for name in images))


def coco_file(folder, images):
    content = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(images, 1)],
        "annotations": [{"id": i, "image_id": i, "caption": "one"} for i, _ in enumerate(images, 1)],
    }
    return rewritten(folder / "c.json", json.dumps(content))


@pytest.mark.parametrize("kind", ["flickr", "coco"])
def test_images_beside_a_file_that_names_them(tmp_path, kind):
    (tmp_path / "images").mkdir()
    names = ["a.bmp", "b.bmp"]
    for name in names:
        picture(tmp_path / "images" / name)
    list_of = {"flickr": caption_file, "coco": coco_file}[kind]
    uri = f"{kind}:{list_of(tmp_path, names)}?images={tmp_path}/images"
    stamp = lambda: open_source(uri).stamp()  # noqa: E731
    assert stamp() == stamp()
    assert changed(stamp, lambda: picture(tmp_path / "images" / "b.bmp", "blue"))  # of the same size, in its place
    tars = [tmp_path / f"{place}.tar" for place in range(2)]
    for path, name in zip(tars, names, strict=True):
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "images" / name, name)
    uri = f"{kind}:{list_of(tmp_path, names)}?images={tmp_path}/{{0..1}}.tar"
    assert changed(stamp, lambda: tars[1])  # and not the first one alone


def test_masks_that_have_changed(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    picture(tmp_path / "images" / "a.bmp")
    Image.new("L", (8, 8), 1).save(tmp_path / "masks" / "a.png")
    rewritten(tmp_path / "classes.json", '["ground", "thing"]')
    stamp = lambda: open_source(f"masks:{tmp_path}").stamp()  # noqa: E731
    assert stamp() == stamp()
    assert changed(stamp, lambda: picture(tmp_path / "images" / "a.bmp", "blue"))
    assert changed(stamp, lambda: tmp_path / "masks" / "a.png")


# Real encoders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), tiny_recipe())


@pytest.fixture
def passes(monkeypatch):
    """Counts the images and texts that go through the towers."""
    seen = {"images": 0, "texts": 0}

    def counted(name, method):
        def call(self, inputs, *more):
            seen[name] += len(inputs)
            return method(self, inputs, *more)

        return call

    monkeypatch.setattr(TowersEncoder, "encode", counted("images", TowersEncoder.encode))
    monkeypatch.setattr(TowersEncoder, "texts", counted("texts", TowersEncoder.texts))
    return seen


def test_tasks_share_features_and_a_second_command_encodes_nothing(run, passes):
    uri, trained_on = "scenes:val?count=24", "scenes:train?count=40"

    def measure(model="teacher"):
        quick = {"workers": 0, "batch_size": 16}
        zero_shot = tasks.run(str(run.folder), "zero_shot", uri, model=model, settings=quick).metrics
        after_one = dict(passes)
        retrieval = tasks.run(str(run.folder), "retrieval", uri, model=model, settings=quick).metrics
        knn = tasks.run(str(run.folder), "knn", uri, trained_on, model, quick | {"ks": [1, 5], "k": 5}).metrics
        return (zero_shot, retrieval, knn), after_one

    first, after_one = measure()
    assert after_one["images"] == 24
    assert passes["images"] == 24 + 40
    texts = passes["texts"]
    again, _ = measure()
    assert again == first
    assert passes == {"images": 64, "texts": texts}
    tasks.run(str(run.folder), "zero_shot", uri, model="student", settings={"workers": 0})
    assert passes["images"] == 64 + 24
    assert passes["texts"] > texts


def _extract(run, out):
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        encoder = load_encoder(str(run), device="cpu")
        here = Features(encoder, open_source("scenes:val?count=24"), EvaluationConfig(workers=0))
        torch.save([here.images().embeddings, here.texts(["a red disc", "two"])], out)


def _encode_nothing(run, out):
    TowersEncoder.encode = TowersEncoder.texts = None
    _extract(run, out)


def test_another_process_encodes_nothing(run, tmp_path):
    """The key is the same in every process, and nothing is taken from memory."""
    Processes(_extract, run.folder, tmp_path / "first.pt", output=tmp_path / "printed").finish()
    Processes(_encode_nothing, run.folder, tmp_path / "second.pt", output=tmp_path / "printed").finish()
    for one, other in zip(*(torch.load(tmp_path / f"{name}.pt") for name in ("first", "second")), strict=True):
        assert one.equal(other)


SOURCE = plain.Colours(COLOURS, bad=[4, 17])
TEXTS = ["a red hat", "blue", "green tea", "white", "yellow", "black", "purple"]


def _extract_a_share(folder, where):
    with pytest.MonkeyPatch.context() as patch, distributed.session() as place:
        assert place.ranks == 2
        small_shards(patch)
        here = features(SOURCE, features=str(folder / f"of rank {place.rank}") if where == "not shared" else where)
        images = here.images()
        counted = Counting.images
        embeddings = here.texts(TEXTS)
        parts = [images.embeddings, images.cls, images.patches, images.indices, images.labels, embeddings]
        torch.save([counted, parts, images.captions, images.bad], folder / f"{place.rank}.pt")


@pytest.mark.parametrize("where", ["auto", None, "/proc/nowhere", "not shared"])
def test_two_ranks_encode_a_share_each_and_find_what_one_finds(tmp_path, where):
    """On a common disk, without one, and where each rank has a disk of its own."""
    Processes(_extract_a_share, tmp_path, where, ranks=2, output=tmp_path / "printed").finish()
    alone = features(SOURCE, features=None)
    expected = alone.images()
    shares = []
    for rank in range(2):
        counted, parts, captions, bad = torch.load(tmp_path / f"{rank}.pt")
        shares.append(counted)
        names = ("embeddings", "cls", "patches", "indices", "labels")
        assert all(part.equal(getattr(expected, name)) for part, name in zip(parts, names, strict=False))
        assert parts[-1].equal(alone.texts(TEXTS))
        assert (captions, bad) == (expected.captions, expected.bad)
    # Shards of 5, 5, 5, 5 and 3 examples, of which one in the first and one in the fourth are bad.
    assert shares == ([21, 21] if where == "not shared" else [12, 9])


class Failing(Counting):
    """On the second rank alone."""

    def encode(self, pixels, layers=0):
        if ranks.rank() == 1:
            raise UserError("the second rank's GPU is gone")
        return super().encode(pixels, layers)


def _fail_on_one():
    with pytest.MonkeyPatch.context() as patch, distributed.session() as place:
        assert place.ranks == 2
        small_shards(patch)
        with pytest.raises(UserError if place.rank == 0 else distributed.StoppedElsewhere):
            features(encoder=Failing()).images()


def test_what_fails_on_one_rank_ends_both(tmp_path):
    Processes(_fail_on_one, ranks=2, output=tmp_path / "printed").finish()


def test_what_changes_the_computation_but_no_weight_changes_the_fingerprint(tmp_path):
    found = {
        load_encoder(str(saved_run(tmp_path / str(i), tiny_recipe(*overrides)).folder), "untrained").fingerprint()
        for i, overrides in enumerate(
            [[], ["model.image.heads=4"], ["model.text.activation=quick_gelu"], ["model.text.heads=4"]]
        )
    }
    assert len(found) == 4
    same = saved_run(tmp_path / "same", tiny_recipe("model.image.drop_path=0.5"))
    assert load_encoder(str(same.folder), "untrained").fingerprint() in found


def test_half_precision_is_close_to_full(run):
    encoder, source = load_encoder(str(run.folder), device="cpu"), open_source("scenes:val?count=8")
    full, half = (features(source, encoder, precision=precision) for precision in ("fp32", "bf16"))
    assert not full.images().embeddings.equal(half.images().embeddings)
    torch.testing.assert_close(full.images().embeddings, half.images().embeddings, atol=0.05, rtol=0)
    torch.testing.assert_close(full.texts(["a red disc"]), half.texts(["a red disc"]), atol=0.05, rtol=0)
    assert half.images().cls.dtype == torch.float32


def test_features_that_are_not_finite_are_refused_and_not_kept(cache_home):
    class Broken(Counting):
        def encode(self, pixels, layers=0):
            encoding = super().encode(pixels, layers)
            encoding.layers[-1].patches.fill_(float("nan")) if Counting.images > 12 else None
            return encoding

        def see(self, pixels):
            return super().see(pixels).clone()

    with pytest.raises(UserError, match="not finite"):
        features(encoder=Broken()).images()
    assert len(files(cache_home)) == 2
