"""SupCon against a plain transcription, and labels that reach a batch for it and for nothing else."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from parts import ALL, assert_same, batch_of, learner_of, losses_of

from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.data.sources import open_source
from harmony.errors import UserError
from harmony.objectives.registry import kinds
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

HEAD = {"hidden": 16, "output": 8, "layers": 2, "norm": "none"}
HERE = Place(torch.device("cpu"), rank=0, ranks=1)
SCENES = (
    "model.image={width: 16, depth: 1, heads: 2}",
    "data={train: 'scenes:train?size=24&count=16', val: null, batch_size: 8, workers: 0}",
    "views.global.size=24",
)


def labelled(learner) -> Batch:
    batch = batch_of(learner)
    batch.labels = torch.tensor([3, 1, 3, 0, 3])
    return batch


def test_supcon():
    learner = learner_of({"supcon": {"head": HEAD, "temperature": 0.3}})
    batch = labelled(learner)
    seen = torch.cat([learner.student.image.encode(crop).cls for crop in batch.images["global"]])
    z = [row / row.norm() for row in learner.objectives["supcon"].head(seen)]
    classes = batch.labels.repeat(2).tolist()
    terms = []
    for i in range(10):
        others = sum(torch.exp(z[i] @ z[a] / 0.3) for a in range(10) if a != i)
        positives = [p for p in range(10) if p != i and classes[p] == classes[i]]
        assert len(positives) == (5 if classes[i] == 3 else 1)
        terms.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.3) / others) for p in positives) / len(positives))
    assert_same(losses_of(learner, batch)["supcon"], torch.stack(terms).mean(), learner)


def test_without_a_class_in_common_it_is_simclr():
    supcon, simclr = learner_of({"supcon": {"head": HEAD}}), learner_of({"simclr": {"head": HEAD}})
    simclr.objectives["simclr"].load_state_dict(supcon.objectives["supcon"].state_dict())
    batch = labelled(supcon)
    batch.labels = torch.tensor([4, 2, 0, 1, 9])
    assert torch.allclose(losses_of(supcon, batch)["supcon"], losses_of(simclr, batch)["simclr"], rtol=1e-12)


def first_batch(name: str, *overrides: str) -> tuple[Batch, list[int]]:
    """The first batch of a recipe on scenes, and the true labels of its examples."""
    trainer = Trainer(recipes.load(name, [*SCENES, *overrides]), HERE)
    with closing(trainer.loader.batches(0)) as batches:
        batch = next(batches)
    source = open_source(trainer.recipe.data.train)
    labels = {source.key(i): source[i].label for i in range(len(source))}
    return batch, [labels[key] for key in batch.keys]


def test_labels_are_those_of_the_examples():
    batch, true = first_batch("supcon-small")
    assert batch.labels is not None and batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == true and len(set(true)) > 2


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("simclr-small", ()), ("supcon-small", ("objectives.supcon.weight=0", "objectives.vicreg={head: {hidden: 8}}"))],
)
def test_no_label_reaches_a_recipe_that_does_not_ask(name: str, overrides: tuple[str, ...]):
    assert first_batch(name, *overrides)[0].labels is None


def test_supcon_alone_is_supervised():
    assert [name for name, kind in kinds().items() if kind.needs_labels] == ["supcon"]
    assert not learner_of(ALL).needs_labels()


def test_data_without_classes_are_refused_before_training(tmp_path: Path):
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "images.csv").write_text("image\n" + "".join(f"{number}.png\n" for number in range(8)))
    with pytest.raises(UserError, match=r"no example of .* has a class, but an objective of this recipe learns from"):
        first_batch("supcon-small", f"data.train=table:{tmp_path}/images.csv")
    assert first_batch_of_table(tmp_path).labels is None


def first_batch_of_table(folder: Path) -> Batch:
    recipe = recipes.load("simclr-small", [*SCENES, f"data.train=table:{folder}/images.csv"])
    with closing(Trainer(recipe, HERE).loader.batches(0)) as batches:
        return next(batches)


def test_an_example_without_a_class_is_replaced(tmp_path: Path):
    from PIL import Image

    rows = ["image,label"]
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'' if number == 3 else number % 2}")
    (tmp_path / "images.csv").write_text("\n".join(rows))
    recipe = recipes.load(
        "supcon-small", [*SCENES, f"data.train=table:{tmp_path}/images.csv", "data.max_bad_share=0.5"]
    )
    with closing(Trainer(recipe, HERE).loader.batches(0)) as batches:
        batch = next(batches)
    assert any(reason == "has no class" for _, reason in batch.skipped)
    assert sorted(set(batch.labels.tolist())) == [0, 1]
