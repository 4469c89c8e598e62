"""Recipes: what is read is what is written, what is laid over what, and what is said of mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.errors import UserError
from harmony.objectives.registry import kinds
from harmony.recipe import Recipe, check_against_data, differences, load, resolve, total_steps
from harmony.recipe_text import explained

EVERY = recipe_files.names()

MINIMAL = """
model: {image: {name: vit_tiny_patch16_224, patch: 8}}
data: {train: "scenes:"}
views: {global: {count: 2, size: 32}}
objectives: {clip: {}}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = resolve(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.needs


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_reads_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    recipe = resolve(name)
    recipe.save(tmp_path / "recipe.yaml")
    again = resolve(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.fingerprint() == recipe.fingerprint()
    assert differences(again, recipe) == []


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_reads_back_from_its_explanation(name: str, tmp_path: Path) -> None:
    text = explained(resolve(name))
    assert resolve(written(tmp_path, text, "recipe.yaml")) == resolve(name)
    assert max(map(len, text.splitlines())) <= 160
    assert yaml.safe_load(text)["objectives"]  # any reader of YAML can read it


@given(
    rate=st.floats(1e-7, 1.0),
    start=st.floats(0, 1),
    stop=st.floats(0, 1),
    over=st.sampled_from(["10 epochs", "1 epoch", "500 steps", "30%", "0.5 epochs"]),
    shape=st.sampled_from(["linear", "cosine"]),
    steps=st.none() | st.integers(10, 10**6),
    low=st.floats(0.01, 0.5),
)
def test_any_numbers_read_back_as_written(
    rate: float, start: float, stop: float, over: str, shape: str, steps: int | None, low: float
) -> None:
    values = recipe_files.read("quickstart")
    values["optim"] |= {"lr": rate, "warmup": "1%"}
    values["train"] |= {"steps": steps}
    values["objectives"]["clip"]["hard_weight"] = {shape: {"from": start, "to": stop, "over": over}}
    values["views"]["global"]["scale"] = [low, 1.0]
    recipe = Recipe.model_validate(values)
    assert Recipe.model_validate(recipe_files.parse(recipe.to_yaml())) == recipe


WORDS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=12) | st.sampled_from(
    ["1e5", "1e-5", ".5", "on", "no", "null", "~", "010", "1_0", "2024-01-01", "a: b", "a #b", "- a", "{a", "'", "? a"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=6)


@given(st.dictionaries(WORDS, VALUES, max_size=4))
def test_any_values_read_back_as_written(values: dict[str, Any]) -> None:
    text = recipe_files.written(values)
    if recipe_files.MISSING not in text:
        assert recipe_files.parse(text) == values


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "{a: 1e-4, b: 5.0e-4, c: on, d: 010, e: 2024-01-01, f: ~, g: true, h: ???, i: [no, 0x1]}"
    expected = [1e-4, 5e-4, "on", 10, "2024-01-01", None, True, "???", ["no", "0x1"]]
    assert list(recipe_files.parse(text).values()) == expected


def test_settings_have_the_values_of_the_files(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, MINIMAL))
    assert recipe.name == "mine"
    assert recipe.model.image.patch == 8
    assert type(recipe.objectives["clip"]) is kinds()["clip"].Config
    assert recipe.objectives["clip"].type == "clip"
    assert recipe.largest_view == 32


# What is laid over what


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    base = written(tmp_path, MINIMAL + "optim: {lr: 1e-3, eps: 1e-5}", "base.yaml")
    child = written(tmp_path, f"extends: {base}\noptim: {{lr: 2e-3}}\nviews: {{local: {{size: 16}}}}", "child.yaml")
    recipe = load(child)
    assert (recipe.optim.lr, recipe.optim.eps) == (2e-3, 1e-5)
    assert set(recipe.views) == {"global", "local"}
    assert recipe.name == "child"


def test_extends_is_relative_to_the_file_and_takes_names(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    written(tmp_path, "extends: quickstart\noptim: {eps: 1e-4}", "base.yaml")
    child = written(tmp_path / "inner", "extends: ../base.yaml", "child.yaml")
    assert load(child).optim.eps == 1e-4


def test_a_recipe_cannot_extend_itself(tmp_path: Path) -> None:
    written(tmp_path, "extends: b.yaml", "a.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load(written(tmp_path, "extends: a.yaml", "b.yaml"))


def test_null_removes_objectives_and_views(tmp_path: Path) -> None:
    child = written(tmp_path, "extends: quickstart\nobjectives: {mae: null, mlm: null}")
    assert set(load(child).objectives) == {"clip", "dino", "ibot", "text_distillation"}
    assert set(load("quickstart", ["objectives.mae=null"]).objectives) == set(load("quickstart").objectives) - {"mae"}
    assert set(load("quickstart", ["objectives.dino.local_view=null", "views.local=null"]).views) == {"global"}
    assert load("quickstart", ["optim.clip_norm=null"]).optim.clip_norm is None


def test_a_view_of_the_file_may_go_unused_and_a_new_one_may_be_used(tmp_path: Path) -> None:
    assert "local" in load("quickstart", ["objectives.dino=null", "objectives.ibot=null"]).views
    used = ["views.extra={size: 24}", "objectives.dino.local_view=extra"]
    assert load("quickstart", used).to_dict()["views"]["extra"]["count"] == 1
    silent = [used[0], "objectives.more={type: mae, view: extra, weight: 0}"]
    assert "extra" in load("quickstart", silent).views


@pytest.mark.parametrize("text", ["extends: quickstart\nviews: {lokal: null}", MINIMAL + "  mea: null"])
def test_a_file_cannot_remove_what_is_not_there(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown (view 'lokal'; did you mean 'local'|objective 'mea')"):
        load(written(tmp_path, text.replace("objectives: {clip: {}}", "objectives:\n  clip: {}")))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=3", "train.epochs", 3.0),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("data.train=shards:../a/train-{00000..00011}.tar", "data.train", "shards:../a/train-{00000..00011}.tar"),
        ("data.train=folder:/with space/a #1: b", "data.train", "folder:/with space/a #1: b"),
        ("data.train='scenes:train'", "data.train", "scenes:train"),
        ("data.train=table:a.csv?caption_key=title&x=1", "data.train", "table:a.csv?caption_key=title&x=1"),
        ("optim.betas=[0.8, 0.9]", "optim.betas", [0.8, 0.9]),
        ("efficiency.compile=true", "efficiency.compile", True),
        ("views.global.photometric=none", "views.global.photometric", "none"),
        (
            "objectives.clip.hard_weight={linear: {from: 1, to: 0}}",
            "objectives.clip.hard_weight",
            {"linear": {"from": 1.0, "to": 0.0}},
        ),
        (
            "objectives.clip.hard_weight.cosine.to=0.5",
            "objectives.clip.hard_weight",
            {"cosine": {"from": 1.0, "to": 0.5}},
        ),
        ("objectives.clip.hard_weight=1", "objectives.clip.hard_weight", 1.0),
        ("model.image=vit_small_patch8_224", "model.image.name", "vit_small_patch8_224"),
    ],
)
def test_overrides(override: str, key: str, value: Any) -> None:
    found = load("quickstart", ["objectives.ibot.masks.block.share=0.25", override]).to_dict()
    assert found["objectives"]["ibot"]["masks"]["block"]["share"] == 0.25
    for part in key.split("."):
        found = found[part]
    assert found == value


def test_an_override_within_a_section_keeps_its_other_settings() -> None:
    block = load("quickstart", ["objectives.ibot.masks.block.share=0.25"]).to_dict()["objectives"]["ibot"]["masks"][
        "block"
    ]
    assert block["ratio"] == [0.1, 0.5]


def test_a_model_written_as_one_word_can_be_refined(tmp_path: Path) -> None:
    text = MINIMAL.replace("{name: vit_tiny_patch16_224, patch: 8}", "vit_tiny_patch16_224")
    image = load(written(tmp_path, text), ["model.image.patch=8"]).model.image
    assert (image.name, image.patch) == ("vit_tiny_patch16_224", 8)


def test_two_objectives_of_one_type_and_the_type_is_kept() -> None:
    recipe = load("quickstart", ["objectives.plain={type: clip, hard_weight: 1}"])
    values = recipe.to_dict()["objectives"]
    assert values["plain"]["type"] == "clip"
    assert "type" not in values["clip"]
    assert type(recipe.objectives["plain"]) is type(recipe.objectives["clip"])


# What matters for results


@pytest.mark.parametrize(
    "override",
    [
        "efficiency.backward=joint",
        "efficiency.checkpointing=blocks",
        "data.workers=3",
        "data.train=folder:elsewhere",
        "data.val=null",
        "train.log_every=1 step",
        "train.keep=1",
        "train.checkpoint_every=5 steps",
        "train.loggers=[tensorboard]",
        "evaluation.batch_size=7",
        "name=other",
    ],
)
def test_the_fingerprint_ignores_what_leaves_results_alone(override: str) -> None:
    plain, other = load("quickstart"), load("quickstart", [override])
    assert plain != other
    assert plain.fingerprint() == other.fingerprint()
    assert differences(plain, other) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lr=1e-5", ["optim.lr"]),
        ("train.seed=1", ["train.seed"]),
        ("train.steps=77", ["train.steps"]),
        ("data.batch_size=32", ["data.batch_size"]),
        ("objectives.clip.hard_weight=1", ["objectives.clip.hard_weight"]),
        ("views.global.scale=[0.1, 0.2]", ["views.global.scale"]),
        ("model.text.layers=1", ["model.text.layers"]),
    ],
)
def test_differences_name_what_changes_results(override: str, named: list[str]) -> None:
    plain, other = load("quickstart"), load("quickstart", [override])
    assert plain.fingerprint() != other.fingerprint()
    assert differences(plain, other) == differences(other, plain) == named


def test_differences_name_a_removed_objective() -> None:
    gone = differences(load("quickstart"), load("quickstart", ["objectives.mae=null"]))
    assert gone
    assert all(key.startswith("objectives.mae.") for key in gone)


def test_each_quirk_of_the_published_recipe_is_one_named_setting() -> None:
    assert differences(resolve("harmony"), resolve("harmony-published")) == [
        "model.image.positions",
        "model.text.truncation",
        "data.chance",
        "objectives.clip.max_scale",
        "objectives.mae.decoder.positions",
        "objectives.mae.over_crops",
        "objectives.mlm.attention",
        "objectives.mlm.decoder.init",
        "objectives.text_distillation.freeze_prototypes",
        "objectives.text_distillation.attention",
        "objectives.text_distillation.centre_on",
        "optim.decay",
        "optim.clip_scope",
    ]


# What is wrong, in one sentence


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optm.lr=1", "unknown key 'optm'; did you mean 'optim'?"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'train.epochs'?"),
        ("model.patch=8", "unknown key 'model.patch'; did you mean 'model.image.patch'?"),
        ("objectives.mae.decoder.widht=3", "did you mean 'objectives.mae.decoder.width'?"),
        ("views.global.photometric={jiter: 1}", "did you mean 'views.global.photometric.jitter'?"),
        ("objectives.mea.weight=1", "unknown objective 'mea'; did you mean 'mae'?"),
        ("objectives.clip.type=nothing", "unknown type of objective 'nothing'; known: "),
        (
            "objectives.mae.view=globl",
            "objectives.mae.view is 'globl', but no view has this name; did you mean 'global'?",
        ),
        ("views.local=null", "this view was removed; objectives.dino.local_view=null does without"),
        ("views.global=null", "this view was removed; objectives.clip=null does without the objective"),
        ("objectives.dino.local_view=lokal", "did you mean 'local'? (objectives.dino.local_view=null does without)"),
        ("objectives.mea=null", "unknown objective 'mea'; did you mean 'mae'?"),
        ("objectives={mea: null}", "unknown objective 'mea'; did you mean 'mae'?"),
        ("views.lokal=null", "unknown view 'lokal'; did you mean 'local'?"),
        ("views.lokal.size=24", "no objective uses the view 'lokal'; did you mean 'local'?"),
        ("model.image=vit_tyni_patch16_224", "did you mean 'vit_tiny_patch16_224'?"),
        ("model.image=resnet50", "is a ResNet, not a plain VisionTransformer"),
        ("model.image=vit_tiny_patch16_224.augreg_in21k", "model.init=timm:vit_tiny_patch16_224.augreg_in21k"),
        ("views.global.photometric=dino_frist", "did you mean 'dino_first'?"),
        ("evaluation.tasks=retreival", "unknown task 'retreival'; did you mean 'retrieval'?"),
        ("train.precision=bf61", "train.precision must be one of bf16, fp16, fp32, not 'bf61'; did you mean 'bf16'?"),
        ("train.epochs=ten", "train.epochs must be a number, not 'ten' (passes over the data"),
        ("train.epochs=0", "train.epochs must be above 0, not 0"),
        ("train.steps=2.5", "train.steps must be a whole number, not 2.5"),
        ("data.batch_size=0", "data.batch_size must be at least 1, not 0"),
        ("data.batch_size=null", "data.batch_size must be a whole number, not null"),
        ("data.workers=many", "data.workers must be a whole number or 'auto', not 'many'"),
        ("optim.betas=0.9", "optim.betas must be a list, not 0.9"),
        ("data.batch_size=true", "data.batch_size must be a whole number, not true"),
        ("train.steps=true", "train.steps must be a whole number, not true"),
        ("data.workers=false", "data.workers must be a whole number, not false"),
        ("optim.betas=[0.9, true]", "optim.betas[1] must be a number, not true"),
        ("objectives.mae.decoder.depth=true", "objectives.mae.decoder.depth must be a whole number, not true"),
        ("objectives.ibot.masks.block.share=true", "share must be a number, not true"),
        ("views.global.flip=true", "views.global.flip must be a number, not true"),
        ("optim.lr=nan", "optim.lr must be a finite number, not nan"),
        ("optim.lr=.inf", "optim.lr must be a finite number, not inf"),
        ("optim.betas=[0.9]", "optim.betas needs two numbers, not [0.9]"),
        ("train.loggers=[tensorbord]", "did you mean 'tensorboard'?"),
        ("teacher.momentum={cosin: {from: 0.9, to: 1}}", "{'cosin': {'from': 0.9, 'to': 1}} is not a schedule; did"),
        ("teacher.momentum={cosin: {from: 0.9, to: 1}}", "did you mean 'cosine'?"),
        ("teacher.momentum={cosine: {form: 1, to: 0}}", "not form; did you mean 'from'?"),
        ("train.log_every=1", "train.log_every: 1 is not a duration; write it as '1 steps' or '1 epochs'"),
        ("train.checkpoint_every=5", "write it as '5 steps' or '5 epochs'"),
        ("optim.betas=[0.9, 1.5]", "optim.betas[1] must be below 1, not 1.5"),
        ("efficiency.compile=maybe", "efficiency.compile must be true or false, not 'maybe'"),
        ("model.text=3", "model.text must be a section with keys, not 3"),
        ("model.text.width=33", "width 33 is not a multiple of heads 2"),
        ("objectives=null", "objectives must be a section with keys, not null"),
        ("objectives.mae=3", "objectives.mae must be a section with keys"),
        ("objectives.mae.mask_ratio=1.5", "objectives.mae.mask_ratio must be from 0 to 1, not 1.5"),
        ("objectives.mae.weight=-1", "objectives.mae.weight must be at least 0, not -1"),
        ("optim.weight_decay={cosine: {from: 1}}", "a schedule needs from and to"),
        ("optim.weight_decay={cosine: {from: 1, to: x}}", "to must be a number, not 'x'"),
        ("objectives.clip.hard_weight=fast", "is not a schedule; write a number"),
        ("optim.warmup=3 parsecs", "optim.warmup: '3 parsecs' is not a duration; write it as '10 epochs'"),
        ("optim.warmup=1000 steps", "optim.warmup (1000 steps) is longer than the run (360 steps)"),
        ("views.global.size=60", "views.global.size 60 is not a multiple of the patch size 8; set it to 56 or 64"),
        ("views.global.size=4", "views.global.size 4 is smaller than one patch (8 px)"),
        ("views.global.scale=[0.9, 0.5]", "views.global.scale"),
        ("views.global.count=3", "2 entries for 3 crops"),
        ("data.val.uri=x", "cannot be made: data.val is the value"),
        ("train.epochs", "is not an override; write key=value"),
        ("train.epochs=", "train.epochs= has no value; write train.epochs=null"),
        ("optim.betas=[0.9", "the value of optim.betas=[0.9 is not valid YAML"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(override: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load("quickstart", [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_longer_warmup_than_steps() -> None:
    with pytest.raises(UserError, match=r"optim.warmup \(6 steps\) is longer than the run \(5 steps\)"):
        load("quickstart", ["train.steps=5", "optim.warmup=6 steps"])


def test_warmup_against_the_data() -> None:
    recipe = load("quickstart", ["train.steps=null", "train.epochs=2", "optim.warmup=30 steps"])
    check_against_data(recipe, epoch_steps=15)
    with pytest.raises(UserError, match=r"longer than the run \(28 steps of 14 an epoch\)"):
        check_against_data(recipe, epoch_steps=14)
    by_steps = load("quickstart", ["train.steps=20", "optim.warmup=3 epochs"])
    check_against_data(by_steps, epoch_steps=6)
    with pytest.raises(UserError, match=r"optim.warmup \(3 epochs\) is longer than the run \(20 steps"):
        check_against_data(by_steps, epoch_steps=7)


def test_total_steps() -> None:
    assert total_steps(load("quickstart", ["train.steps=null", "train.epochs=2.5"]), epoch_steps=10) == 25
    assert total_steps(load("quickstart", ["train.steps=7"]), epoch_steps=10) == 7


def test_what_must_be_given() -> None:
    with pytest.raises(UserError, match=r"leaves data.train open; add data.train=\.\.\."):
        load("harmony")
    assert load("harmony", ["data.train=scenes:"]).data.train == "scenes:"
    assert resolve("harmony").data.train == recipe_files.MISSING


def test_tasks_without_data() -> None:
    with pytest.raises(UserError, match=r"data\.val is not given; add data\.val=URI"):
        load("quickstart", ["data.val=null", "evaluation.tasks=[retrieval]"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {train: [}", "line 1 is not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3 is not valid YAML: 'a' is given twice"),
        ("1: 2", "the key 1 is not a word"),
        ("just words", "is not a recipe"),
        ("", "is not a recipe"),
        ("extends: [harmony, 3]", "extends must be the name or the file of a recipe, or a list of them, not 3"),
        ("extends: harmny", "unknown recipe 'harmny'; did you mean 'harmony'?"),
        ("data: {train: 'scenes:'}", "views is missing"),
    ],
)
def test_bad_recipe_files(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(written(tmp_path, text))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("harmny", "unknown recipe 'harmny'; did you mean 'harmony'?"),
        ("zzz", "unknown recipe 'zzz'; known: "),
        ("missing.yaml", "there is no recipe file 'missing.yaml'"),
        ("no/such/place", "there is no recipe file"),
    ],
)
def test_unknown_recipes(name: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load(name)
    assert told in str(error.value)


def test_a_run_directory_stands_for_its_recipe(tmp_path: Path) -> None:
    load("quickstart", ["train.seed=5"]).save(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path).train.seed == 5


def test_a_length_in_epochs_takes_the_place_of_the_recipes_steps():
    assert load("quickstart", ["train.epochs=3"]).train.steps is None
    assert load("quickstart", ["train.epochs=3", "train.steps=7"]).train.steps == 7
    with pytest.raises(UserError, match="longer than the run"):
        load("quickstart", ["train.epochs=1", "optim.warmup=5 epochs"])
