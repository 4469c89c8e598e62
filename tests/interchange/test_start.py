"""First weights from files in the real formats: timm, open_clip (both forms), a run, published checkpoints."""

import argparse
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from golden_steps import read_golden
from safetensors.torch import save_file

from harmony.errors import UserError
from harmony.interchange.start import file_of, start_from
from harmony.models.settings import InitConfig, ModelConfig
from harmony.models.towers import Towers

GOLDEN = Path(__file__).parents[1] / "golden" / "harmony_step_a"
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPEN_CLIP_TEXT = {"width": 32, "layers": 2, "heads": 2, "context_length": 77}


def towers(name: str = "vit_tiny_patch16_224", size: int = 32, seed: int = 0, **text) -> Towers:
    torch.manual_seed(seed)
    image = {"name": name, "patch": 8, "width": 32, "depth": 2, "heads": 2}
    return Towers(
        ModelConfig.model_validate(
            {"image": image, "text": {"width": 32, "layers": 2, "heads": 2} | text, "embed": 16}
        ),
        size,
    ).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


IDS = open_clip.tokenize(["a dog", "a red circle left of a blue square"])


def test_a_timm_file(tmp_path: Path, pixels: torch.Tensor):
    torch.manual_seed(5)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TIMM).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = towers()
    text = {k: v.clone() for k, v in ours.text.state_dict().items()}
    start_from(ours, str(tmp_path / "vit.pth"))
    assert torch.allclose(ours.image.encode(pixels).tokens, theirs.forward_features(pixels), atol=1e-5)
    assert all(torch.equal(v, text[k]) for k, v in ours.text.state_dict().items()), "a timm model has no text tower"


def test_positions_are_resized_when_the_input_size_differs(tmp_path: Path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    ours = towers(size=48)
    start_from(ours, str(tmp_path / "vit.safetensors"))
    expected = timm.layers.resample_abs_pos_embed(theirs.pos_embed, [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.allclose(ours.image.trunk.pos_embed, expected, atol=1e-6)


def test_an_open_clip_file_with_a_timm_trunk(tmp_path: Path, pixels: torch.Tensor):
    torch.manual_seed(5)
    theirs = open_clip.CustomTextCLIP(
        16, {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}, OPEN_CLIP_TEXT
    )
    theirs.visual.trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM)
    theirs.visual.head = torch.nn.Sequential()
    theirs.visual.head.add_module("proj", torch.nn.Linear(32, 16, bias=False))
    theirs.eval()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}, tmp_path / "c.pt"
    )
    ours = towers()
    start_from(ours, str(tmp_path / "c.pt"))
    with torch.no_grad():
        assert torch.allclose(ours.image(pixels), theirs.encode_image(pixels), atol=1e-5)
        assert torch.allclose(ours.text(IDS), theirs.encode_text(IDS), atol=1e-5)


def test_an_open_clip_file_with_its_own_vit(tmp_path: Path, pixels: torch.Tensor):
    torch.manual_seed(5)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    theirs = open_clip.CLIP(16, vision, OPEN_CLIP_TEXT).eval()
    torch.save(theirs.state_dict(), tmp_path / "c.pt")
    ours = towers("vit_base_patch16_clip_224")
    start_from(ours, str(tmp_path / "c.pt"))
    with torch.no_grad():
        assert torch.allclose(ours.image(pixels), theirs.encode_image(pixels), atol=1e-5)
        assert torch.allclose(ours.text(IDS), theirs.encode_text(IDS), atol=1e-5)


def test_one_source_a_tower(tmp_path: Path, pixels: torch.Tensor):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    other = towers(seed=9)
    save_file({f"teacher.{k}": v for k, v in other.state_dict().items()}, tmp_path / "run.safetensors")
    ours = towers()
    start_from(ours, InitConfig(image=str(tmp_path / "vit.pth"), text=str(tmp_path / "run.safetensors")))
    with torch.no_grad():
        assert torch.allclose(ours.image.encode(pixels).tokens, theirs.forward_features(pixels), atol=1e-5)
        assert torch.equal(ours.text(IDS), other.text(IDS))


def test_a_run_starts_from_its_last_teacher(tmp_path: Path, pixels: torch.Tensor):
    for step, seed in ((5, 1), (20, 2)):
        place = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        student, teacher = towers(seed=seed + 10), towers(seed=seed)
        state = {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
        save_file(state | {f"student.{k}": v for k, v in student.state_dict().items()}, place / "model.safetensors")
    ours = towers()
    start_from(ours, str(tmp_path / "run"))
    with torch.no_grad():
        assert torch.equal(ours.image(pixels), towers(seed=2).image(pixels))


def test_a_published_checkpoint_file(tmp_path: Path):
    """As the published code writes it: a pickle with a Namespace, names behind `module.`."""
    golden = read_golden(GOLDEN)
    state = {f"module.{k[6:]}": torch.from_numpy(v) for k, v in golden.arrays.items() if k.startswith("state.")}
    file = tmp_path / "checkpoint.pth"
    torch.save({"student": state, "epoch": 25, "args": argparse.Namespace(lr=5e-4)}, file)
    ours = Towers(_golden_model(golden.config), 64)
    start_from(ours, f"published:{file}")
    expected = golden.learner.teacher.state_dict()  # what is evaluated; a teacher's mask tokens are never used
    for name, weight in ours.double().state_dict().items():
        assert torch.equal(weight, expected[name]), name


def _golden_model(config: dict) -> ModelConfig:
    image = {"name": "vit_tiny_patch16_224", "patch": 8, "width": config["width"], "depth": 2, "heads": 4}
    return ModelConfig.model_validate({"image": image, "text": {"width": 16, "layers": 2, "heads": 4}, "embed": 512})


def test_unsafe_pickles_are_refused(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"student": {"image_encoder.cls_token": torch.zeros(1)}, "x": Bomb()}, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").touch()
    for name in ("bad.pth", "text.pth", "empty.pth"):
        for source in (f"published:{tmp_path / name}", str(tmp_path / name)):
            with pytest.raises(UserError, match="is not a PyTorch checkpoint, or holds more than tensors") as told:
                start_from(towers(), source)
            assert "weights_only" not in str(told.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("timm:vit_tny_patch16_224", "did you mean"),
        ("open_clip:ViT-B-31/openai", "did you mean"),
        ("open_clip:ViT-B-32/nonsense", "TAG one of"),
        ("published:nowhere.pth", "no published checkpoint at"),
        ("nowhere", "does not exist"),
    ],
)
def test_sources_that_do_not_exist(source: str, words: str):
    with pytest.raises(UserError, match=words):
        start_from(towers(), source)


def test_weights_that_do_not_fit_are_named(tmp_path: Path):
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(TIMM | {"embed_dim": 64}))
    torch.save(other.state_dict(), tmp_path / "wide.pth")
    ours = towers()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(UserError, match="shape"):
        start_from(ours, str(tmp_path / "wide.pth"))
    deeper = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(TIMM | {"depth": 3}))
    torch.save(deeper.state_dict(), tmp_path / "deep.pth")
    with pytest.raises(UserError, match=r"blocks\.2"):
        start_from(ours, str(tmp_path / "deep.pth"))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), "nothing was half loaded"


def test_a_source_without_a_text_tower_is_refused_when_asked_for_one(tmp_path: Path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="no text tower"):
        start_from(towers(), InitConfig(text=str(tmp_path / "vit.pth")))


def test_the_file_behind_a_source(tmp_path: Path):
    """Of a run its last checkpoint; a file itself; what is fetched has none."""
    places = [tmp_path / "run" / "checkpoints" / f"step-{n:08}" for n in (5, 10)]
    for place in places:
        place.mkdir(parents=True)
        (place / "model.safetensors").touch()
    alone = tmp_path / "vit.safetensors"
    alone.touch()
    assert file_of(str(tmp_path / "run")) == places[1] / "model.safetensors"
    assert file_of(str(places[0])) == places[0] / "model.safetensors"
    assert file_of(str(alone)) == file_of(f"published:{alone}") == file_of(f"open_clip:ViT-B-32/{alone}") == alone
    assert file_of("timm:vit_tiny_patch16_224.augreg_in21k") is None and file_of("open_clip:ViT-B-32/openai") is None
