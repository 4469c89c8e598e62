import shutil

import pytest
import safetensors.torch
import torch
from runs_for_evaluation import saved_run, tiny_recipe

from harmony.chance import Chance
from harmony.data.batch import Batch
from harmony.data.photometric import augment
from harmony.errors import UserError
from harmony.evaluation.encoders import load_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), tiny_recipe())


@pytest.fixture
def spoiled(run, tmp_path):
    """A copy of the run's checkpoint whose weights can be changed."""
    folder = tmp_path / "step-00000003"
    shutil.copytree(run.checkpoint, folder)

    def change(how):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        how(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        return str(folder)

    return change


def test_teacher_and_student_are_what_was_trained(run):
    pixels = torch.randn(3, 3, 32, 32)
    for model in ("teacher", "student"):
        encoder = load_encoder(str(run.folder), model, "cpu")
        own = getattr(run.learner, model).eval()
        torch.testing.assert_close(encoder.images(pixels), own.image(pixels).detach())
        ids = torch.tensor([[49406, 320, 736, 49407], [49406, 320, 49407, 0]])
        torch.testing.assert_close(encoder.texts(["a red", "a"]), own.text(ids).detach())
    assert (
        not load_encoder(str(run.folder), "student")
        .images(pixels)
        .equal(load_encoder(str(run.folder), "teacher").images(pixels))
    )


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (4, "8")])
def test_images_that_cannot_be_cut_into_patches_are_refused(run, size, near):
    with pytest.raises(UserError, match=f"size {size} is not a multiple of the patch size 8; set it to {near}$"):
        load_encoder(str(run.folder), device="cpu").images(torch.randn(1, 3, size, size))


def test_nothing_of_an_encoder_trains(run):
    encoder = load_encoder(str(run.folder))
    assert not any(parameter.requires_grad for parameter in encoder.towers.parameters())
    assert not any(module.training for module in encoder.towers.modules())


def test_a_run_means_its_newest_checkpoint_and_a_checkpoint_itself(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    newer = folder / "checkpoints" / "step-00000012"
    shutil.copytree(folder / "checkpoints" / run.checkpoint.name, newer)
    weights = safetensors.torch.load_file(newer / "model.safetensors")
    weights["teacher.image.proj.weight"] += 1
    safetensors.torch.save_file(weights, newer / "model.safetensors")
    by_run = load_encoder(str(folder)).towers.image.proj.weight
    assert by_run.equal(load_encoder(str(newer)).towers.image.proj.weight)
    assert not by_run.equal(load_encoder(str(folder / "checkpoints" / run.checkpoint.name)).towers.image.proj.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("teacher.image.proj.weight"), "missing: image.proj.weight"),
        (lambda weights: weights.update({"teacher.image.extra": torch.ones(1)}), "unexpected: image.extra"),
        (
            lambda weights: weights.update({"teacher.image.proj.weight": torch.ones(3, 3)}),
            "of another shape: image.proj.weight",
        ),
        (lambda weights: weights["teacher.text.mask_token"].fill_(float("nan")), "not finite: text.mask_token"),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("teacher.")],
            "missing: .* and .* more",
        ),
    ],
)
def test_weights_that_did_not_load_completely_are_refused(spoiled, change, message):
    where = spoiled(change)
    with pytest.raises(UserError, match=message):
        load_encoder(where, "teacher")
    load_encoder(where, "student")  # what is wrong with the teacher does not concern it


def test_places_without_an_encoder(tmp_path, run):
    with pytest.raises(UserError, match="there is no directory 'nowhere'"):
        load_encoder("nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_encoder(str(tmp_path))
    with pytest.raises(UserError, match=f"is none itself; name the newest, {run.checkpoint}"):
        load_encoder(str(run.checkpoint.parent))
    with pytest.raises(UserError, match="unknown model 'techer'; did you mean 'teacher'"):
        load_encoder(str(run.folder), "techer")
    folder = tmp_path / "checkpoint"
    shutil.copytree(run.checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_encoder(str(folder))


def test_images_are_normalised_as_in_training(run):
    encoder = load_encoder(str(run.folder))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    view = run.recipe.views["global"].model_copy(update={"photometric": "none", "count": 1})
    batch = Batch(["a", "b"], Chance.of_examples(0, 0, torch.arange(2)), images={"global": pixels[None]})
    trained_on = augment(batch, {"global": view}, encoder.mean, encoder.std).images["global"][0]
    torch.testing.assert_close(encoder.normalise(pixels), trained_on, rtol=1e-6, atol=1e-6)
    assert encoder.denormalise(encoder.normalise(pixels)).equal(pixels)


@pytest.mark.parametrize(("size", "advice"), [(20, "set it to 16 or 24"), (4, "set it to 8")])
def test_images_that_are_no_whole_patches_are_refused(run, size, advice):
    """A convolution would drop the rest of 20 px without a word, and fail on 4 px with many."""
    with pytest.raises(UserError, match=f"size {size} is not a multiple of the patch size 8; {advice}$"):
        load_encoder(str(run.folder)).images(torch.zeros(1, 3, size, size))


def test_own_colours_of_a_recipe_are_used(tmp_path):
    recipe = tiny_recipe("model.image.mean=[0.5, 0.5, 0.5]", "model.image.std=[0.25, 0.25, 0.25]")
    encoder = load_encoder(str(saved_run(tmp_path, recipe).folder))
    assert encoder.normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)).unique().tolist() == [2.0]


def test_a_model_without_text_reads_nothing(tmp_path):
    gone = [f"objectives.{name}=null" for name in ("clip", "mlm", "text_distillation")]
    recipe = tiny_recipe("model.text=null", *gone)
    encoder = load_encoder(str(saved_run(tmp_path, recipe).folder))
    assert not encoder.reads_text
    assert encoder.images(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(UserError, match="has no text tower"):
        encoder.texts(["a"])


def test_first_weights_need_not_be_there_any_more(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run.checkpoint, folder)
    recipe = (folder / "recipe.yaml").read_text()
    assert "init: null" in recipe
    (folder / "recipe.yaml").write_text(recipe.replace("init: null", "init: gone/away.pt"))
    load_encoder(str(folder))
