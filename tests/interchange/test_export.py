"""Exports, loaded by the library they are for: the same outputs as our towers, or a refusal that says what to do."""

import importlib.util
import json
from pathlib import Path

import onnxruntime
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, ViTModel

from harmony import recipe as recipes
from harmony.errors import UserError
from harmony.interchange.export import Exported, export, formats
from harmony.interchange.export_onnx import Encoder
from harmony.interchange.export_open_clip import written as open_clip_written
from harmony.models.settings import ModelConfig
from harmony.models.towers import Towers

TINY = {"name": "vit_tiny_patch16_224", "patch": 8, "width": 32, "depth": 2, "heads": 2}
CLIP = {**TINY, "name": "vit_base_patch16_clip_224"}
QUICK = {**TINY, "name": "vit_base_patch16_clip_quickgelu_224"}
SCALED = {**TINY, "name": "vit_base_patch14_dinov2"}
REGISTERS = {**TINY, "registers": 3}
DINOV2_REGISTERS = {**TINY, "name": "vit_small_patch14_reg4_dinov2", "registers": 2}
FLEXI = {**TINY, "name": "flexivit_small"}
BEIT3 = {**TINY, "name": "beit3_base_patch16_224"}
TEXT = {"width": 32, "layers": 1, "heads": 2, "context": 20}
IDS = open_clip.tokenize(["a dog", "a red circle left of a blue square"], 20)


def exported(image: dict, text: dict | None = TEXT, size: int = 32, **contrast: float) -> Exported:
    """Towers with weights unlike any first ones."""
    torch.manual_seed(3)
    model = ModelConfig.model_validate({"image": image, "text": text, "embed": 16})
    towers = Towers(model, size)
    with torch.no_grad():
        for value in towers.parameters():
            value += 0.1 * torch.randn_like(value)
    return Exported("runs/mine (teacher)", towers, model, {k: torch.tensor(v) for k, v in contrast.items()})


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", [TINY, CLIP, SCALED, REGISTERS, DINOV2_REGISTERS, FLEXI, BEIT3])
@torch.no_grad()
def test_timm(image: dict, tmp_path: Path, pixels: Tensor):
    what = exported({**image, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, text=None)
    out = export(what, "timm", tmp_path / "new" / "model")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    tokens = what.towers.image.encode(pixels).tokens
    same(tokens, theirs.forward_features(pixels))
    if image is not BEIT3:
        same(tokens[:, 0], theirs(pixels))
    how = timm.data.resolve_model_data_config(theirs)
    sizes = [tuple(how[key]) for key in ("input_size", "mean", "std")]  # lists in older releases of timm
    assert sizes == [(3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]
    assert not any("mask" in name for name in load_file(out / "model.safetensors"))
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)
    assert classifier(pixels).shape == (2, 5)
    assert torch.equal(classifier.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (TINY, TEXT),
        (CLIP, TEXT),
        (QUICK, {**TEXT, "activation": "quick_gelu"}),
        (SCALED, TEXT),
        (FLEXI, TEXT),
        ({"name": "test_vit"}, {**TEXT, "activation": "quick_gelu"}),  # timm's own tower, at its own size
    ],
)
@torch.no_grad()
def test_open_clip(image: dict, text: dict, tmp_path: Path):
    size = 160 if image["name"] == "test_vit" else 32
    what = exported({**image, "mean": (0.1, 0.2, 0.3)}, text, size, logit_scale=3.0, logit_bias=-8.0)
    out = export(what, "open_clip", tmp_path / "model")
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs.eval()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    same(what.towers.image(pixels), theirs.encode_image(pixels))
    same(what.towers.text(IDS), theirs.encode_text(IDS))
    assert (float(theirs.logit_scale), float(theirs.logit_bias)) == (3.0, -8.0)
    assert tuple(prepare.transforms[-1].mean) == (0.1, 0.2, 0.3)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{out}")("a dog"), IDS[:1])


@torch.no_grad()
def test_open_clip_without_a_contrastive_objective_begins_as_open_clip_does(tmp_path: Path):
    out = export(exported(TINY), "open_clip", tmp_path / "model")
    theirs = open_clip.create_model(f"local-dir:{out}")
    assert float(theirs.logit_scale) == pytest.approx(float(torch.tensor(1 / 0.07).log())) and theirs.logit_bias is None


@pytest.mark.parametrize("image", [TINY, SCALED, REGISTERS, DINOV2_REGISTERS, FLEXI])
@torch.no_grad()
def test_huggingface(image: dict, tmp_path: Path, pixels: Tensor):
    what = exported({**image, "mean": (0.1, 0.2, 0.3)})
    out = export(what, "huggingface", tmp_path / "model")
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    load = ViTModel if kind == "ViTModel" else AutoModel
    theirs, loaded = load.from_pretrained(out, output_loading_info=True, **options)
    assert type(theirs).__name__ == kind
    assert not any(loaded[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(what.towers.image.encode(pixels).tokens, theirs.eval()(pixels).last_hidden_state)
    prepared = AutoImageProcessor.from_pretrained(out)(torch.full((3, 40, 64), 51, dtype=torch.uint8))["pixel_values"]
    expected = (0.2 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(what.model.image.std)
    prepared = torch.as_tensor(prepared[0])
    assert prepared.shape == (3, 32, 32)
    assert torch.allclose(prepared, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


@torch.no_grad()
def test_onnx(tmp_path: Path):
    what = exported(REGISTERS)
    out = export(what, "onnx", tmp_path / "model")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    for examples in (1, 3):
        pixels = torch.randn(examples, 3, 32, 32, generator=torch.Generator().manual_seed(examples))
        found = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"pixels": pixels.numpy()}), strict=True)
        )
        encoding = what.towers.image.encode(pixels)
        wanted = {"cls": encoding.cls, "patches": encoding.patches, "embedding": encoding.embed()}
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            same(value, torch.from_numpy(found[name]))
    assert json.loads((out / "preprocessing.json").read_text())["size"] == 32


def test_onnx_has_no_embedding_without_a_text_tower():
    assert Encoder(exported(TINY, text=None)).outputs == ["cls", "patches"]


def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("harmony.interchange.export_onnx.find_spec", lambda n: None if n == "onnxscript" else find(n))
    with pytest.raises(UserError, match=r"package onnxscript; install it by `pip install harmony\[onnx\]`"):
        export(exported(TINY), "onnx", tmp_path / "model")


@pytest.mark.parametrize(
    ("to", "image", "text", "words"),
    [
        ("open_clip", TINY, None, "has no text tower"),
        ("open_clip", REGISTERS, TEXT, "registers"),
        ("open_clip", BEIT3, TEXT, "behind its pooling"),
        ("open_clip", TINY, {**TEXT, "activation": "quick_gelu"}, "train with model.text.activation=gelu"),
        ("open_clip", {**TINY, "name": "vit_base_patch16_224_miil"}, TEXT, "another make"),
        ("huggingface", CLIP, None, "a norm before its blocks"),
        ("huggingface", {**TINY, "name": "vit_base_patch16_224_miil"}, None, "leaves biases out"),
        ("tim", TINY, None, "did you mean 'timm'"),
    ],
)
def test_what_cannot_be_expressed_is_refused(to: str, image: dict, text: dict | None, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        export(exported(image, text), to, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", formats())
def test_a_folder_that_exists_is_left_alone(to: str, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        export(exported(TINY), to, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_half_written_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harmony.interchange.export.save_file", full)
    with pytest.raises(UserError, match="no room on the disk"):
        export(exported(TINY), "timm", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_harmony_fits_into_open_clip():
    """At its own sizes: quick_gelu in the text tower beside timm's own image tower."""
    recipe = recipes.resolve("harmony")
    with torch.device("meta"):
        what = Exported("harmony", Towers(recipe.model, recipe.largest_view), recipe.model)
    contents = open_clip_written(what)
    config = contents["open_clip_config.json"]["model_cfg"]
    with torch.device("meta"):
        theirs = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {
        key: value.shape for key, value in contents["open_clip_model.safetensors"].items()
    }
