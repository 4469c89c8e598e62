"""Reading the rows of a comparison, and putting their recipes on equal terms."""

import pytest
from comparisons import IMAGES, SHARED

from harmony import recipe as recipes
from harmony.comparison.plan import given_weights
from harmony.comparison.rows import read
from harmony.comparison.terms import COMMON, on_equal_terms
from harmony.data.settings import DataConfig
from harmony.errors import UserError
from harmony.recipe_files import flat
from harmony.schedules import Clock


def equal(*arguments: str):
    return on_equal_terms(*read(arguments))


def test_rows_and_overrides_are_told_apart(tmp_path):
    path = tmp_path / "lr=3" / "my recipe.yaml"
    path.parent.mkdir()
    path.write_text("extends: clip-small\n")
    rows, shared = read([str(path), "train.steps = 3", 'clip-small optim.lr=1e-3 "views.global={size: 32}"', "a=b c"])
    assert shared == ["train.steps = 3", "a=b c"]
    assert [row.recipe for row in rows] == [str(path), "clip-small"]
    assert rows[0].name == "my recipe"
    assert rows[1].own == ("optim.lr=1e-3", "views.global={size: 32}")
    assert rows[1].name == "clip-small optim.lr=1e-3 views.global={size: 32}"
    assert "/" not in rows[1].folder
    assert read(["clip-small", "clip-small name=other optim.lr=1"])[0][1].name == "other"
    assert read(["clip-small", f"clip-small name=other a={'1' * 300}"])[0][1].name == "other"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "two recipes or more, and there is none"),
        (["clip-small", "train.steps=3"], "there is only 'clip-small'"),
        (["clip-small", "clip-small"], "two rows are called 'clip-small'"),
        (["clip-small", "quickstart name=Clip-Small"], "two rows are called 'Clip-Small'"),
        (["clip-small", "quickstart name=untrained"], "the model before training"),
        (["clip-small", "quickstrat"], "did you mean 'quickstart'?"),
        (["clip-small", "quickstart a=1 b"], "'b' in the row"),
        (["clip-small", "quickstart a='1"], "put quotes in pairs"),
        (["clip-small", f"quickstart a={'1' * 300}"], "give it a short name"),
    ],
)
def test_rows_that_cannot_be_read(arguments, told):
    with pytest.raises(UserError) as error:
        read(arguments)
    assert told in str(error.value)


def test_what_is_common_is_the_first_rows_and_the_rest_stays(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: clip-small\nmodel: {text: {activation: quick_gelu}}\n")
    first, second = equal("quickstart", str(own), "train.steps=50", "evaluation.knn.temperature=0.1")
    values = [dict(flat(row.recipe.to_dict())) for row in (first, second)]
    for key in COMMON:
        assert values[0].get(key) == values[1].get(key), key
    assert second.recipe.data.batch_size == 64
    assert second.recipe.train.steps == 50
    assert second.recipe.model.text == first.recipe.model.text
    assert second.changes == ("model.text.activation quick_gelu → gelu", "evaluation as quickstart")
    assert first.changes == ()
    assert second.recipe.evaluation.knn.temperature == 0.1
    assert set(second.recipe.objectives) == {"clip"}
    assert second.recipe.optim.clip_norm == 3.0


@pytest.mark.parametrize(
    "first", [("clip-small",), ("mae-small",), ("clip-small", "train.epochs=3"), ("clip", "train.steps=7")]
)
def test_every_row_is_as_long_as_the_first(first):
    """Recipes say their length in steps or in epochs, and those with steps have epochs of their method's besides."""
    others = ("simclr-small", "slip-small", "simclr")
    rows = equal(
        first[0],
        *others,
        *first[1:],
        "data.train=scenes:train?size=48",
        "views.global.size=48",
        "views.augmented.size=48",
        "optim.warmup=1 step",
    )
    assert len({(row.recipe.train.steps, row.recipe.train.epochs) for row in rows}) == 1
    assert rows[0].recipe.train.steps == recipes.load(first[0], [*first[1:], "data.train=x"]).train.steps
    told = [change.split()[0] for row in rows[1:] for change in row.changes]
    assert "train.epochs" not in told or rows[0].recipe.train.steps is None  # with steps, epochs decide nothing


def test_every_setting_of_the_data_is_common_or_known_to_be_a_methods_own():
    common = {key.removeprefix("data.") for key in COMMON if key.startswith("data.")}
    assert set(DataConfig.model_fields) - common == {"chance", "caption_augment"}  # as docs/comparing.md says


def test_data_and_model_of_the_first_row_are_laid_over_a_recipe_that_leaves_them_open():
    small, large = equal("clip-small", "clip views.global.size=40 optim.warmup=10%")
    assert large.recipe.data == small.recipe.data
    assert large.recipe.model == small.recipe.model
    assert large.recipe.train.epochs == small.recipe.train.epochs
    assert large.recipe.optim.weight_decay.start == 0.5
    assert any(change.startswith("data.train '???' → 'scenes:train") for change in large.changes)
    with pytest.raises(UserError, match=r"the row 'clip': .* add data\.train="):
        equal("clip", "clip-small")


def test_a_recipe_without_texts_stays_without_wherever_it_stands():
    for rows in ((IMAGES, "clip-small"), ("clip-small", IMAGES)):
        by_name = {row.name: row for row in equal(*rows, *SHARED)}
        assert by_name["images"].recipe.model.text is None
        assert by_name["clip-small"].recipe.model.text.width == 16
        left = [change for change in by_name["images"].changes if "left out" in change]
        assert len(left) == 1
        assert left[0].startswith("model.text={width: 16")
        assert left[0].endswith("it has no text tower")


def test_an_override_of_an_objective_concerns_the_rows_that_have_it():
    clip, harmony = equal("clip-small", "quickstart", "objectives.mae.weight=0.25", "views.local.size=16")
    assert harmony.recipe.objectives["mae"].weight.start == 0.25
    assert set(clip.recipe.objectives) == {"clip"}
    assert set(clip.recipe.views) == {"global"}
    assert clip.changes == (
        "objectives.mae.weight=0.25 left out: it has no objective 'mae'",
        "views.local.size=16 left out: it has no view 'local'",
    )
    with pytest.raises(UserError, match="unknown objective 'mea'; did you mean 'mae'"):
        equal("clip-small", "quickstart", "objectives.mea.weight=0.25")
    with pytest.raises(UserError, match="none has a text tower"):
        equal(IMAGES, f"{IMAGES} name=other", "model.text.width=32")


@pytest.mark.parametrize(
    "own",
    ["train.steps=3", "data.batch_size=8", "data={batch_size: 8}", "model.image.depth=2", "model.image=vit_tiny",
     "model.text.width=8", "evaluation.knn.temperature=0.1"],
)  # fmt: skip
def test_what_is_common_cannot_be_changed_for_one_row(own):
    with pytest.raises(UserError, match=r"cannot be of the row .* alone"):
        equal("clip-small", f"quickstart '{own}'")


@pytest.mark.parametrize("shared", ["train.seed=3", "train.keep=1"])
def test_what_a_comparison_sets_itself_cannot_be_given(shared):
    for rows in (("quickstart", shared), (f"quickstart {shared}",)):
        with pytest.raises(UserError, match="cannot be set"):
            equal("clip-small", *rows)


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        ("train={seed: 3}", "'train.seed=3' cannot be set"),
        ("name=all", "names no row; write it within the quotes"),
        ("model=null", "name a setting within, as in model.NAME=VALUE"),
        ("objectives={mea: {weight: 2}}", "unknown objective 'mea'; did you mean 'mae'"),
        ("frozen.tokeniser.init=x", "unknown frozen model 'tokeniser'"),
    ],
)
def test_overrides_that_cannot_be_of_all_rows(shared, told):
    with pytest.raises(UserError) as error:
        equal("clip-small", "quickstart", shared)
    assert told in str(error.value)


def test_images_must_be_equally_large():
    with pytest.raises(
        UserError, match=r"'quickstart' have 48 px and those of 'clip-small' 40 px; .*views.global.size=40"
    ):
        equal("clip-small", "quickstart views.global.size=48 name=quickstart")


def test_errors_name_the_row():
    with pytest.raises(UserError, match=r"the row 'quickstart': optim.warmup \(9 steps\) is longer"):
        equal("clip-small", "quickstart optim.warmup='9 steps' name=quickstart", "train.steps=4")


def test_an_override_of_a_whole_section_concerns_the_rows_that_have_its_parts():
    rows = equal("clip-small", "quickstart", "objectives={mlm: {share: 0.3}, clip: {label_smoothing: 0.1}}")
    assert set(rows[0].recipe.objectives) == {"clip"}
    assert rows[0].changes[0].startswith("objectives.mlm={share: 0.3} left out")
    assert all(row.recipe.objectives["clip"].label_smoothing == 0.1 for row in rows)
    assert rows[1].recipe.objectives["mlm"].share(Clock(0, 1, 1)) == 0.3
    [dino, clip] = equal("dino-small", "clip-small", "model={text: {width: 32, heads: 2}}")
    assert dino.recipe.model.text is None and clip.recipe.model.text.width == 32


def test_a_frozen_model_concerns_the_rows_that_have_one():
    rows = equal("clip-small", "beit-small", "frozen.tokenizer.init=somewhere")
    assert rows[0].recipe.frozen == {} and rows[1].recipe.frozen["tokenizer"].init == "somewhere"


def test_what_weights_a_row_is_given():
    rows = equal("clip-small", "beit-small", "frozen.tokenizer.init=somewhere", "model.init={image: a, text: b}")
    both = {"model.init.image": "a", "model.init.text": "b"}
    assert [given_weights(row.recipe) for row in rows] == [both, both | {"frozen.tokenizer.init": "somewhere"}]
    assert given_weights(equal("clip-small", "siglip-small")[0].recipe) == {}


def test_positions_are_a_rows_own():
    rows = equal("clip-small", "mae-small")
    assert [row.recipe.model.image.position_embedding for row in rows] == ["learned", "sine_cosine"]


def test_a_run_from_before_a_setting_moved_is_read(tmp_path):
    (tmp_path / "old.yaml").write_text("extends: mocov3-small\nobjectives: {mocov3: {freeze_patches: true}}\n")
    assert recipes.load(str(tmp_path / "old.yaml")).model.image.freeze_patches
