import errno
import json
import os
import shutil

import numpy as np
import plain_metrics as plain
import pytest
import torch
from PIL import Image
from runs_for_evaluation import saved_run, tiny_recipe

from harmony import evaluation
from harmony.data.sources import open_source
from harmony.data.views import evaluation_crop
from harmony.errors import UserError
from harmony.evaluation import tasks
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.results import read_details, read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), tiny_recipe())


def by_hand(run, uri, count):
    """Embeddings of a source's images and captions, made one by one."""
    encoder, source = load_encoder(str(run.folder)), open_source(uri)
    images, captions = [], []
    for i in range(count):
        example = source[i]
        pixels = torch.from_numpy(np.array(example.image.convert("RGB"))).permute(2, 0, 1)
        crop = evaluation_crop(pixels, encoder.size)[None]
        images.append(plain.unit(encoder.images(encoder.normalise(crop))[0]))
        captions += [(i, plain.unit(encoder.texts([text])[0]), text) for text in example.captions]
    return images, captions


def test_retrieval_is_what_is_found_by_hand(run):
    uri = "scenes:val?count=12"
    images, captions = by_hand(run, uri, 12)
    metrics = evaluation.run(str(run.folder), "retrieval", uri, settings={"workers": 0})
    vectors = [vector for _, vector, _ in captions]
    own = [{place for place, (o, _, _) in enumerate(captions) if o == i} for i in range(12)]
    assert len({text for _, _, text in captions}) == len(captions)  # no equal captions to think of here
    for k in (1, 5, 10):
        forwards = plain.recall([plain.rank(vector, images, {i}) for i, vector, _ in captions], k)
        backwards = plain.recall([plain.rank(images[i], vectors, own[i]) for i in range(12)], k)
        assert metrics[f"text_to_image_recall@{k}"] == pytest.approx(forwards)
        assert metrics[f"image_to_text_recall@{k}"] == pytest.approx(backwards)


def test_results_are_written_beside_those_of_other_tasks(run, tmp_path):
    asked = {"data_uri": "scenes:val?count=20", "settings": {"workers": 0}, "out": tmp_path}
    first = tasks.run(str(run.folder), "retrieval", **asked)
    second = tasks.run(str(run.folder), "zero_shot", **asked)
    assert read_metrics(tmp_path) == {"retrieval": first.metrics, "zero_shot": second.metrics}
    assert (read_details(tmp_path, "zero_shot") or {})["model"].endswith("(teacher)")
    assert (read_details(tmp_path, "retrieval") or {})["data"] == "scenes:val?count=20"
    assert sum(one["images"] for one in (read_details(tmp_path, "zero_shot") or {})["classes"]) == 20


def test_batches_and_workers_change_nothing(run):
    found = [
        tasks.run(
            str(run.folder),
            "retrieval",
            "scenes:val?count=20",
            settings={"workers": workers, "batch_size": size, "features": None},
        ).metrics
        for workers, size in ((0, 20), (1, 3), (2, 7))
    ]
    assert found[0] == found[1] == found[2]


def test_shares_are_fractions(run):
    for task in tasks.AUTO:
        metrics = tasks.run(str(run.folder), task, "scenes:val?count=20", settings={"workers": 0}).metrics
        shares = [value for name, value in metrics.items() if "recall" in name or "top" in name or "mean" in name]
        assert all(0 <= share <= 1 for share in shares)
        assert json.loads(json.dumps(metrics)) == metrics


def test_a_run_is_measured_as_its_recipe_says(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    found = evaluation.evaluate_run(folder, run.recipe)
    assert list(found) == ["zero_shot", "retrieval"]
    assert read_metrics(folder) == found
    assert found["retrieval"]["images"] == found["zero_shot"]["examples"] == 24
    assert capsys.readouterr().err.count("encoding 24 images") == 1  # once for both tasks


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.tasks=zero_shot"], ["zero_shot"]),
        (["evaluation.tasks=[]"], []),
        (["data.val=null"], []),
        (["model.text=null", *(f"objectives.{name}=null" for name in ("clip", "mlm", "text_distillation"))], []),
    ],
)
def test_only_what_is_asked_for_and_possible_is_measured(tmp_path, overrides, expected):
    recipe = tiny_recipe(*overrides)
    saved = saved_run(tmp_path / "run", recipe)
    assert list(tasks.evaluate_run(saved.folder, recipe)) == expected
    assert (saved.folder / "metrics.json").exists() == bool(expected)


def test_what_cannot_be_measured_is_said(run, tmp_path):
    where = str(run.folder)
    with pytest.raises(UserError, match="unknown task 'zeroshot'; did you mean 'zero_shot'"):
        tasks.run(where, "zeroshot", "scenes:val")
    with pytest.raises(UserError, match="unknown kind of data 'scene'"):
        tasks.run(where, "zero_shot", "scene:val")
    with pytest.raises(UserError, match="unknown templates 'plian'"):
        tasks.run(where, "zero_shot", "scenes:val?count=4", settings={"templates": "plian", "workers": 0})
    with pytest.raises(UserError, match=r"data\.val is not given"):
        tasks.evaluate_run(run.folder, tiny_recipe("data.val=null", "evaluation.tasks=retrieval"))
    images_alone = tiny_recipe(
        "model.text=null", *(f"objectives.{name}=null" for name in ("clip", "mlm", "text_distillation"))
    )
    saved = saved_run(tmp_path / "images", images_alone)
    with pytest.raises(UserError, match="needs a text tower"):
        tasks.run(str(saved.folder), "retrieval", "scenes:val?count=4")


def test_nothing_is_written_when_a_task_fails(run, tmp_path):
    with pytest.raises(UserError):
        tasks.run(str(run.folder), "zero_shot", "scenes:val", settings={"templates": "?"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_retrieval_on_flickr8k(run, shared):
    uri = f"shards:{shared}/data/captions/flickr8k/val-{{00000..00001}}.tar"
    metrics = tasks.run(str(run.folder), "retrieval", uri, settings={"max_examples": 60, "workers": 0}).metrics
    assert (metrics["images"], metrics["bad_examples"]) == (60, 0)
    assert 4 * 60 < metrics["captions"] <= 5 * 60
    assert metrics["text_to_image_recall@10"] < 0.5  # it has learned nothing


def test_zero_shot_on_clothing(run, shared):
    uri = f"shards:{shared}/data/classification/clothing10/test-00000.tar"
    settings = {"max_examples": 50, "workers": 0, "templates": "openai"}
    metrics = tasks.run(str(run.folder), "zero_shot", uri, settings=settings).metrics
    assert (metrics["examples"], metrics["unlabelled"], metrics["bad_examples"]) == (50, 0, 0)
    assert metrics["chance_top1"] == 0.1
    assert metrics["chance_top5"] == 0.5


def test_results_are_not_put_into_a_file(tmp_path):
    """Said first, before data or weights are looked at: neither of them is there."""
    (tmp_path / "taken").touch()
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        with pytest.raises(UserError, match="taken is a file; choose another --out"):
            evaluation.run("nowhere", "retrieval", "folder:nowhere", out=out)


def test_a_folder_that_cannot_be_written_to_is_said_first(tmp_path, monkeypatch):
    """Rights do not bind root, who may run this: the system's answer is put in their place."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile._os.mkdir", refuse)
    with pytest.raises(UserError, match=r"nothing can be written to .* \(Permission denied\); choose another --out"):
        evaluation.run("nowhere", "retrieval", "folder:nowhere", out=tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("most", "trained_on"), [(None, None), (20, None), (8, 8)])
def test_a_card_tells_when_a_part_is_measured(run, most, trained_on):
    settings = {"max_examples": most, "workers": 0, "ks": 5, "k": 5}
    train, data = "scenes:train?count=20", "scenes:val?count=24"
    outcome = tasks.run(str(run.folder), "knn", data, train, settings=settings)
    part = f" ({most} of its 24 examples, spread evenly)" if most else ""
    assert outcome.details["card"]["split"].endswith(f"every labelled example of {data}{part}")
    assert ("of its 20 examples" in outcome.details["card"]["split"]) == (trained_on is not None)
    assert outcome.metrics["train_examples"] == (trained_on or 20)


def test_what_data_left_out_is_told_and_kept(run, tmp_path, capsys):
    for name in "ab":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    captions = tmp_path / "captions.txt"
    captions.write_text("image,caption\na.png,one thing\nb.png,another thing\nc.png,nothing\n")
    uri = f"flickr:{captions}"
    out = tmp_path / "out"
    tasks.run(str(run.folder), "retrieval", uri, settings={"workers": 0}, out=out)
    told = "images that are not there (left out): 1, as c.png"
    assert f"In {uri}: {told}" in capsys.readouterr().err
    assert (read_details(out, "retrieval") or {})["problems"] == {uri: [told]}


def test_retrieval_without_captions_fails_before_any_image_is_encoded(run, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")

    def encode(features):
        raise AssertionError("images were encoded")

    monkeypatch.setattr("harmony.evaluation.features.Features.images", encode)
    with pytest.raises(UserError, match="has a caption; retrieval needs image-caption pairs"):
        evaluation.run(str(run.folder), "retrieval", f"folder:{tmp_path}", settings={"workers": 0})


def test_a_folder_holds_the_results_of_one_model(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    tasks.run(str(run.folder), "zero_shot", "scenes:val?count=8", out=out)
    before = (out / "metrics.json").read_text()
    with pytest.raises(UserError, match=r"holds results of .*\(teacher\); choose another --out for those of .*student"):
        tasks.run(str(run.folder), "retrieval", "scenes:val?count=8", model="student", out=out)
    assert (out / "metrics.json").read_text() == before
    tasks.run(os.path.relpath(run.folder), "retrieval", "scenes:val?count=8", out=out)  # the same one, named otherwise
    monkeypatch.chdir(tmp_path)  # where the name that was kept leads nowhere
    tasks.run(str(run.checkpoint), "zero_shot", "scenes:val?count=8", out=out)


def test_scenes_of_one_split_are_not_measured_on_themselves(run):
    with pytest.raises(UserError, match="measured on what it learned from"):
        tasks.run(str(run.folder), "knn", "scenes:train?count=8", "scenes:train?count=40&size=32")


def test_copies_of_training_images_are_counted_and_told(run, tmp_path, capsys):
    for name, places in (("train", range(12)), ("test", range(8, 14))):
        for place in places:
            example = open_source("scenes:val?count=14&size=32")[place]
            folder = tmp_path / name / f"class{place % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            example.image.save(folder / f"{place}.png")
    for task, settings in (("knn", {"ks": [1], "k": 1}), ("linear", {})):
        tasks.run(str(run.folder), task, f"folder:{tmp_path}/test", f"folder:{tmp_path}/train", settings=settings)
        assert "4 of the 6 images" in capsys.readouterr().err


def test_fewer_images_than_neighbours_are_refused_before_they_are_encoded(run, tmp_path):
    with pytest.raises(UserError, match=r"knn wants 10 neighbours or more, and .* has 6 labelled images"):
        tasks.run(str(run.folder), "knn", "scenes:val?count=8", "scenes:train?count=6", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
