"""Models of timm and open_clip, from small files in their own formats, against those libraries' own forward passes."""

import argparse
import copy
import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from golden_steps import read_golden
from runs_for_evaluation import saved_run, tiny_recipe
from safetensors.torch import save_file
from torch.testing import assert_close

from harmony.errors import UserError
from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.open_clip_encoder import OpenClipEncoder, _create
from harmony.evaluation.tasks import run
from harmony.evaluation.timm_encoder import TimmEncoder
from harmony.evaluation.trunk import Trunk

PIXELS = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))

# Class token; none but a register, and a norm behind mean pooling; attention pooling, as SigLIP's; convolutions.
TIMM = ["test_vit", "test_vit2", "test_vit3", "test_convnext", "test_resnet"]

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
AVERAGED = VIT | {"pool_type": "avg", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
UNUSUAL = AVERAGED | {
    "final_ln_after_pool": True,
    "pos_embed_type": "sin_cos_2d",
    "no_ln_pre": True,
    "ls_init_value": 0.5,
}
WITH_TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
OPEN_CLIP = {
    "tiny-vit": {"vision_cfg": VIT},
    "tiny-quick": {"vision_cfg": VIT, "quick_gelu": True},
    "tiny-averaged": {"vision_cfg": AVERAGED},
    "tiny-unusual": {"vision_cfg": UNUSUAL},
    "tiny-timm": {"vision_cfg": WITH_TIMM, "custom_text": True},
    "tiny-map": {
        "vision_cfg": WITH_TIMM | {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "embed_dim": 96,
        "custom_text": True,
    },
    "tiny-classifier": {"vision_cfg": WITH_TIMM | {"timm_proj": ""}},
    "tiny-conv": {"vision_cfg": WITH_TIMM | {"timm_model_name": "test_convnext", "timm_pool": "avg"}},
    "tiny-resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "tiny-coca": {
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT,
        "custom_text": True,
    },
}
OPAQUE = ["tiny-resnet", "tiny-coca"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module", autouse=True)
def architectures(folder):
    """Small architectures that open_clip knows meanwhile."""
    before = list(open_clip.factory._MODEL_CONFIG_PATHS), dict(open_clip.factory._MODEL_CONFIGS)
    configs = folder / "configs"
    configs.mkdir()
    for name, config in OPEN_CLIP.items():
        (configs / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT} | config))
    open_clip.add_model_config(configs)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS, open_clip.factory._MODEL_CONFIGS = before


def stirred(model):
    """Weights unlike any first ones, so that a bias of zero or a norm of ones cannot be mistaken for another.

    What open_clip leaves as the memory was (CoCa's `text_projection`) may be anything, and is made a number.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.nan_to_num_(0.0, 0.0, 0.0).clamp_(-100, 100)
                value += 0.05 * torch.randn(value.shape, generator=generator).abs()
    return model.eval()


def timm_file(folder, name, **options):
    """timm's model, with a classifier, and a file of its weights."""
    theirs = stirred(timm.create_model(name, **options))
    save_file(theirs.state_dict(), folder / f"{name}.safetensors")
    return theirs, f"timm:{name}?weights={folder / f'{name}.safetensors'}"


def open_clip_file(folder, name):
    theirs = stirred(open_clip.create_model(name))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, folder / name)
    return theirs, f"open_clip:{name}?weights={folder / name}"


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_a_timm_model_says_what_timm_says(folder, name):
    theirs, where = timm_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    features = theirs.forward_features(PIXELS)
    pooled = theirs.forward_head(features, pre_logits=True)
    assert (encoder.size, encoder.embed, encoder.reads_text) == (160, pooled.shape[1], False)
    assert encoder.mean == theirs.pretrained_cfg["mean"]
    assert encoder.std == theirs.pretrained_cfg["std"]
    assert_close(encoder.images(PIXELS), pooled)
    encoding = encoder.encode(PIXELS, encoder.depth)
    assert_close(encoding.embedding, pooled)
    assert len(encoding.layers) == encoder.depth
    side = 160 // encoder.patch
    for layer in encoding.layers:
        assert layer.cls.shape == (2, encoder.width)
        assert layer.patches.shape == (2, encoder.width, side, side)
    if name != "test_vit":
        assert_close(encoding.layers[-1].cls, pooled)
    assert encoder.name == where


@torch.no_grad()
def test_layers_of_a_vit_are_timms_own_after_the_final_norm(folder):
    theirs, where = timm_file(folder, "test_vit")
    _, expected = theirs.forward_intermediates(PIXELS, indices=3, norm=True, return_prefix_tokens=True)
    layers = load_encoder(where, device="cpu").encode(PIXELS, 3).layers
    for layer, (patches, prefix) in zip(layers, expected, strict=True):
        assert_close(layer.patches, patches)
        assert_close(layer.cls, prefix[:, 0])


@torch.no_grad()
def test_a_norm_behind_the_pooling_is_put_on_every_token(folder):
    theirs, where = timm_file(folder, "test_vit2")
    tokens = theirs.fc_norm(
        theirs.forward_intermediates(PIXELS, norm=True, intermediates_only=True, output_fmt="NLC")[6]
    )
    layer = load_encoder(where, device="cpu").encode(PIXELS, 2).layers[0]
    assert_close(layer.patches.flatten(2).transpose(1, 2), tokens)
    assert_close(layer.cls, tokens.mean(dim=1))
    theirs, where = timm_file(folder, "test_convnext")
    last = load_encoder(where, device="cpu").encode(PIXELS, 1).layers[0]
    assert_close(last.patches, theirs.head.norm(theirs.forward_features(PIXELS)))


@torch.no_grad()
def test_layers_of_a_run_are_timms_too(tmp_path):
    encoder = load_encoder(str(saved_run(tmp_path, tiny_recipe()).folder), device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    trunk = encoder.towers.image.trunk
    _, expected = trunk.forward_intermediates(pixels, norm=True, return_prefix_tokens=True)
    for layer, (patches, prefix) in zip(encoder.encode(pixels, 2).layers, expected, strict=True):
        assert_close(layer.patches, patches)
        assert_close(layer.cls, prefix[:, 0])


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
@torch.no_grad()
def test_positions_are_interpolated_at_another_size(folder, name):
    theirs, where = timm_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    own = encoder.images(PIXELS)
    theirs.set_input_size(img_size=(96, 192))
    wide = torch.randn(2, 3, 96, 192)
    expected = theirs.forward_head(theirs.forward_features(wide), pre_logits=True)
    assert_close(encoder.images(wide), expected)
    assert encoder.encode(wide, 1).layers[0].patches.shape == (2, encoder.width, 6, 12)
    assert encoder.images(PIXELS).equal(own), "the weights themselves stay as they are"
    assert_close(encoder.backbone(192).eval()(torch.ones(1, 3, 192, 192)), encoder.images(torch.ones(1, 3, 192, 192)))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_convnext", "test_resnet"])
def test_a_backbone_is_a_trainable_copy_of_the_encoder(folder, name):
    _, where = timm_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    before = encoder.images(PIXELS)
    backbone = encoder.backbone(160, drop_path=0.3)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert {parameter.data_ptr() for parameter in backbone.parameters()}.isdisjoint(
        parameter.data_ptr() for parameter in encoder.trunk.model.parameters()
    )
    rates = [module.drop_prob for module in backbone.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    assert_close(backbone.eval()(PIXELS).detach(), before)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 1
    assert encoder.images(PIXELS).equal(before)


@torch.no_grad()
def test_a_hierarchical_model_resizes_its_windows():
    def build(drop_path):
        sizes = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "drop_path_rate": drop_path}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes)

    theirs = stirred(build(0.0))
    trunk = Trunk("swin", copy.deepcopy(theirs), build, (224, 224), torch.device("cpu"))
    encoder = TimmEncoder("swin", trunk, 224, torch.device("cpu"))
    assert (encoder.depth, encoder.patch, encoder.width, encoder.embed) == (1, 32, 192, 192)
    theirs.set_input_size(img_size=(160, 160))
    layer = encoder.encode(PIXELS, 1).layers[0]
    assert_close(layer.patches.permute(0, 2, 3, 1), theirs.forward_features(PIXELS))
    assert_close(layer.cls, theirs(PIXELS))
    assert_close(encoder.backbone(160, 0.1).eval()(PIXELS), theirs(PIXELS))


@torch.no_grad()
def test_usual_wrappings_of_a_state_dict_are_taken_off(tmp_path):
    theirs, _ = timm_file(tmp_path, "test_vit")
    state = theirs.state_dict()
    pooled = theirs.forward_head(theirs.forward_features(PIXELS), pre_logits=True)
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    for place, content in enumerate(
        [
            {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 1},
            {"model": headless},
            headless | {"mask_token": torch.zeros(1, 1, 64)},  # as DINOv2 has it, which timm understands
            {key: value.half().float() if key == "pos_embed" else value for key, value in state.items()},
        ]
    ):
        torch.save(content, tmp_path / f"{place}.pt")
        images = load_encoder(f"timm:test_vit?weights={tmp_path / f'{place}.pt'}", device="cpu").images(PIXELS)
        assert_close(images, pooled, rtol=1e-2 if place == 3 else 1e-5, atol=1e-2 if place == 3 else 1e-5)


@torch.no_grad()
def test_files_without_counts_of_batches_are_whole(folder):
    theirs, where = timm_file(folder, "test_resnet")
    state = {key: value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    save_file(state, folder / "test_resnet.safetensors")
    pooled = theirs.forward_head(theirs.forward_features(PIXELS), pre_logits=True)
    assert_close(load_encoder(where, device="cpu").images(PIXELS), pooled)


@torch.no_grad()
def test_weights_saved_at_another_size_are_measured_at_that_size(folder):
    theirs = stirred(timm.create_model("test_vit3", img_size=96, num_classes=0))
    save_file(theirs.state_dict(), folder / "small.safetensors")
    encoder = load_encoder(f"timm:test_vit3?weights={folder / 'small.safetensors'}", device="cpu")
    assert encoder.size == 96
    pixels = torch.randn(2, 3, 96, 96)
    assert_close(encoder.images(pixels), theirs(pixels))
    assert_close(encoder.backbone(96).eval()(pixels).detach(), theirs(pixels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.2.mlp.fc1.weight"), r"missing: blocks\.2\.mlp\.fc1\.weight; give weights"),
        (lambda state: state.update({"decoder.weight": torch.ones(1)}), r"unexpected: decoder\.weight"),
        (lambda state: state.update({"cls_token": torch.ones(1, 1, 32)}), "of another shape: cls_token"),
        (lambda state: state.update({"pos_embed": torch.ones(1, 90, 64)}), "of another shape: pos_embed"),
        (
            lambda state: state.update(
                {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8), "mask_token": torch.ones(1)}
            ),
            "unexpected: mask_token",
        ),
        (lambda state: state["norm.bias"].fill_(float("inf")), r"not finite: norm\.bias"),
        (lambda state: [state.pop(name) for name in list(state) if "blocks" in name], r"missing: .* and \d+ more"),
    ],
)
def test_timm_weights_that_do_not_fit_are_named(tmp_path, change, message):
    state = timm.create_model("test_vit").state_dict()
    change(state)
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(UserError, match=message):
        load_encoder(f"timm:test_vit?weights={tmp_path / 'vit.pt'}", device="cpu")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A machine without network, but with one model in the cache of the hub that timm fetches from."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--timm--test_vit.r160_in1k"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return place / "snapshots" / ("0" * 40) / "model.safetensors"


@torch.no_grad()
def test_pretrained_weights_are_those_that_timm_fetches(hub):
    theirs = stirred(timm.create_model("test_vit"))
    save_file(theirs.state_dict(), hub)
    for name in ("timm:test_vit", "timm:test_vit.r160_in1k"):
        images = load_encoder(name, device="cpu").images(PIXELS)
        assert_close(images, theirs.forward_head(theirs.forward_features(PIXELS), pre_logits=True))
    state = theirs.state_dict()
    state.pop("norm.weight")
    save_file(state, hub)
    with pytest.raises(UserError, match=r"the weights of timm:test_vit cannot be had .*; give them as"):
        load_encoder("timm:test_vit", device="cpu")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("timm:test_vit2", "the weights of timm:test_vit2 cannot be had"),
        ("timm:resnet200", "timm has no pretrained weights for resnet200; give them as"),
        (
            "timm:vit_tinny_patch16_224",
            "unknown timm model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'",
        ),
        ("timm:test_vit.r160_in2k", "did you mean 'r160_in1k'"),
        ("timm:test_vit?size=64", r"the one thing that may follow a model's name is \?weights=FILE"),
        ("timm:test_vit?weights=", r"\?weights=FILE"),
        ("timm:test_vit?weights=gone.pt", "there is no file gone.pt"),
        ("timm:", "timm: names nothing; write timm:NAME"),
        ("tim:test_vit", "unknown kind of model 'tim'; did you mean 'timm'"),
        ("open_clip:ViT-B-33", "unknown open_clip model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32", "names no weights; write open_clip:ViT-B-32/TAG with TAG one of openai"),
        ("open_clip:ViT-B-32/opnai", "did you mean 'openai'"),
        ("open_clip:ViT-B-32/openai?weights=mine.pt", "names weights twice"),
        ("open_clip:ViT-S-16", "write open_clip:ViT-S-16[?]weights=FILE"),
        ("open_clip:tiny-vit?weights=gone.pt", "there is no file gone.pt"),
        ("published:gone.pth", "no published checkpoint at gone.pth"),
        ("published:", "published: names nothing; write published:FILE"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_sentence(where, message):
    with pytest.raises(UserError, match=message) as told:
        load_encoder(where, device="cpu")
    assert "\n" not in str(told.value)


def test_a_bare_file_does_not_say_what_model_it_is_for(tmp_path):
    (tmp_path / "vit.pt").touch()
    with pytest.raises(UserError, match=r"write timm:NAME\?weights=.*vit.pt"):
        load_encoder(str(tmp_path / "vit.pt"))


@pytest.mark.parametrize("where", ["timm:test_vit", "open_clip:tiny-vit"])
def test_untrained_needs_no_weights_and_is_the_same_each_time(where):
    before = torch.get_rng_state()
    first, second = (load_encoder(where, "untrained", "cpu") for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert first.fingerprint() == second.fingerprint()
    assert first.name == f"{where} (untrained)"
    with pytest.raises(UserError, match="has no student; leave --model out"):
        load_encoder(where, "student")
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        load_encoder(where, "teach")


def test_fingerprints_differ_with_the_weights(folder):
    _, where = timm_file(folder, "test_vit")
    assert load_encoder(where, device="cpu").fingerprint() == load_encoder(where, device="cpu").fingerprint()
    assert load_encoder(where, device="cpu").fingerprint() != load_encoder("timm:test_vit", "untrained").fingerprint()
    _, where = open_clip_file(folder, "tiny-vit")
    encoder = load_encoder(where, device="cpu")
    assert encoder.fingerprint() != load_encoder("open_clip:tiny-vit", "untrained").fingerprint()


@pytest.mark.parametrize("changes", [{"act_layer": "quick_gelu"}, {"num_heads": 1}, {"global_pool": "avg"}])
def test_fingerprints_differ_where_the_same_weights_compute_something_else(folder, changes):
    _, where = timm_file(folder, "test_vit")
    plain = load_encoder(where, device="cpu")
    model = timm.create_model("test_vit", num_classes=0, **changes)
    model.load_state_dict(plain.trunk.model.state_dict(), strict=False)
    name = "timm:other" if "num_heads" in changes else plain.trunk.name  # heads belong to an architecture's name
    other = TimmEncoder("other", Trunk(name, model, None, (160, 160), torch.device("cpu")), 160, torch.device("cpu"))
    assert not torch.equal(other.images(PIXELS), plain.images(PIXELS))
    assert other.fingerprint() != plain.fingerprint()


def test_fingerprints_know_the_activation_that_a_tag_asks_for():
    def encoder(**options):
        torch.manual_seed(3)
        model = open_clip.create_model("tiny-vit", **options)
        return OpenClipEncoder("open_clip:tiny-vit", "tiny-vit", model, torch.device("cpu"))

    plain, quick = encoder(), encoder(force_quick_gelu=True)
    assert encoder().fingerprint() == plain.fingerprint()
    assert not torch.equal(plain.images(PIXELS[..., :32, :32]), quick.images(PIXELS[..., :32, :32]))
    assert plain.fingerprint() != quick.fingerprint()


def test_a_size_that_does_not_fit_is_refused(folder):
    _, where = timm_file(folder, "test_vit")
    encoder = load_encoder(where, device="cpu")
    with pytest.raises(UserError, match="100 is not a multiple of the patch size 16; set size to 96 or 112"):
        encoder.images(torch.zeros(1, 3, 100, 100))
    with pytest.raises(UserError, match="set size to 96 or 112"):
        encoder.backbone(100)
    fixed = load_encoder("timm:xcit_nano_12_p16_224", "untrained", "cpu")
    with pytest.raises(UserError, match="cannot take images of 128 x 128 px; set size to its own, 224"):
        fixed.images(torch.zeros(1, 3, 128, 128))
    with pytest.raises(UserError, match="has no text tower"):
        encoder.texts(["a dog"])


@pytest.mark.parametrize("name", OPEN_CLIP)
@torch.no_grad()
def test_an_open_clip_model_says_what_open_clip_says(folder, name):
    theirs, where = open_clip_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    pixels = torch.randn(3, 3, encoder.size, encoder.size)
    expected = theirs.encode_image(pixels, normalize=False)
    assert encoder.embed == expected.shape[1]
    assert_close(encoder.images(pixels), expected, rtol=1e-5, atol=1e-5)
    encoding = encoder.encode(pixels, encoder.depth)
    assert_close(encoding.embedding, expected, rtol=1e-5, atol=1e-5)
    assert len(encoding.layers) == encoder.depth
    side = encoder.size // encoder.patch
    for layer in encoding.layers:
        assert layer.cls.shape == (3, encoder.width)
        assert layer.patches.shape == (3, encoder.width, side, side)
    sentences = ["a dog", "a red circle left of a blue square"]
    read = theirs.encode_text(open_clip.tokenize(sentences, context_length=16), normalize=False)
    assert encoder.reads_text
    assert_close(encoder.texts(sentences), read, rtol=1e-5, atol=1e-5)
    assert encoder.mean == open_clip.OPENAI_DATASET_MEAN
    assert (encoder.trunk is None) == (name in OPAQUE)


@torch.no_grad()
def test_layers_of_open_clips_vit_are_open_clips_own(folder):
    theirs, where = open_clip_file(folder, "tiny-quick")
    pixels = torch.randn(2, 3, 32, 32)
    expected = theirs.visual.forward_intermediates(pixels, normalize_intermediates=True, output_extra_tokens=True)
    layers = load_encoder(where, device="cpu").encode(pixels, 2).layers
    for place, layer in enumerate(layers):
        assert_close(layer.patches, expected["image_intermediates"][place], rtol=1e-5, atol=1e-5)
        assert_close(layer.cls, expected["image_intermediates_prefix"][place][:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_open_clips_positions_are_interpolated_as_open_clip_does_it(folder):
    theirs, where = open_clip_file(folder, "tiny-vit")
    larger = open_clip.create_model("tiny-vit", force_image_size=48).eval()
    open_clip.load_checkpoint(larger, str(folder / "tiny-vit"))
    pixels = torch.randn(2, 3, 48, 48)
    encoder = load_encoder(where, device="cpu")
    assert_close(encoder.images(pixels), larger.encode_image(pixels), rtol=1e-4, atol=1e-4)
    backbone = encoder.backbone(48, drop_path=0.2).eval()
    assert_close(backbone(pixels) @ theirs.visual.proj, larger.encode_image(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-unusual", "tiny-map", "tiny-classifier", "tiny-conv"])
@torch.no_grad()
def test_an_open_clip_backbone_is_a_timm_model(folder, name):
    _, where = open_clip_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    pixels = torch.randn(2, 3, encoder.size, encoder.size)
    backbone = encoder.backbone(encoder.size, drop_path=0.1)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    rates = [module.drop_prob for module in backbone.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.1)
    backbone.eval()
    assert_close(backbone.forward_features(pixels), encoder.trunk.model.forward_features(pixels))
    backbone.reset_classifier(5)
    assert backbone(pixels).shape == (2, 5)
    assert backbone.group_matcher()


@pytest.mark.parametrize("name", OPAQUE)
def test_towers_without_an_equal_in_timm_stay_frozen(folder, name):
    _, where = open_clip_file(folder, name)
    encoder = load_encoder(where, device="cpu")
    with pytest.raises(UserError, match="since it is no timm model; choose a task that keeps the encoder frozen"):
        encoder.backbone(encoder.size)
    with pytest.raises(UserError, match="px alone, not of 128 x 128 px"):
        encoder.images(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("text_projection"), "missing: text_projection; give weights"),
        (lambda state: state.update({"visual.extra": torch.ones(1)}), r"unexpected: visual\.extra"),
        (lambda state: state.update({"visual.proj": torch.ones(32, 8)}), r"of another shape: visual\.proj"),
        (lambda state: state["ln_final.bias"].fill_(float("nan")), r"not finite: ln_final\.bias"),
    ],
)
def test_open_clip_weights_that_do_not_fit_are_named(tmp_path, change, message):
    state = open_clip.create_model("tiny-vit").state_dict()
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=message):
        load_encoder(f"open_clip:tiny-vit?weights={tmp_path / 'clip.pt'}", device="cpu")


def test_a_tag_brings_its_weights_and_how_they_were_trained(folder, monkeypatch):
    theirs, _ = open_clip_file(folder, "tiny-quick")
    tag = {"file": str(folder / "tiny-quick"), "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"ours": tag})
    encoder = load_encoder("open_clip:tiny-vit/ours", device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(encoder.images(pixels), theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.25,) * 3)
    assert load_encoder("open_clip:tiny-vit", "untrained", "cpu").mean == (0.5,) * 3
    torch.save({}, folder / "broken")
    monkeypatch.setitem(tag, "file", str(folder / "broken"))
    with pytest.raises(UserError, match="the weights of open_clip:tiny-vit/ours cannot be had"):
        load_encoder("open_clip:tiny-vit/ours", device="cpu")


def test_preprocessing_of_a_file_is_what_all_weights_of_the_architecture_agree_on(monkeypatch):
    known = {"a": {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "b": {"mean": (0.5,) * 3, "std": (0.2,) * 3}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", known)
    how = open_clip.get_model_preprocess_cfg(_create("tiny-vit", None))
    assert (how["mean"], how["std"]) == ((0.5,) * 3, open_clip.OPENAI_DATASET_STD)


def test_without_a_tokenizer_images_are_measured_and_texts_refused(folder, monkeypatch):
    def unreachable(name):
        raise OSError("no files of this tokenizer")

    _, where = open_clip_file(folder, "tiny-vit")
    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    encoder = load_encoder(where, device="cpu")
    assert encoder.images(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    with pytest.raises(UserError, match="its tokenizer cannot be had \\(no files of this tokenizer\\)"):
        encoder.texts(["a dog"])


def test_a_published_checkpoint_of_any_size(tmp_path):
    golden = read_golden(Path(__file__).parents[1] / "golden" / "harmony_step_a")
    state = {f"module.{k[6:]}": torch.from_numpy(v) for k, v in golden.arrays.items() if k.startswith("state.")}
    torch.save({"student": state, "args": argparse.Namespace(lr=5e-4)}, tmp_path / "published.pth")
    for model in ("teacher", "student"):
        encoder = load_encoder(f"published:{tmp_path / 'published.pth'}", model, "cpu")
        expected = getattr(golden.learner, model).state_dict()
        for name, weight in encoder.towers.double().state_dict().items():
            assert weight.equal(expected[name]), name
    state.pop("module.image_encoder.norm.weight")
    torch.save({"student": state}, tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"the student of published:.* has no weight for image\.trunk\.norm\.weight"):
        load_encoder(f"published:{tmp_path / 'published.pth'}", "student", "cpu")


def test_tasks_take_them_by_name(folder, tmp_path, caplog):
    _, where = open_clip_file(folder, "tiny-vit")
    caplog.clear()
    settings = {"workers": 0, "batch_size": 16}
    outcome = run(where, "zero_shot", "scenes:val?count=24&size=48", settings=settings, out=tmp_path)
    assert 0 <= outcome.metrics["top1"] <= 1
    assert json.loads((tmp_path / "metrics.json").read_text())["zero_shot"] == outcome.metrics
    assert not caplog.records, "no library warns of weights that were loaded"
    with pytest.raises(UserError, match="needs a text tower"):
        run("timm:test_vit", "zero_shot", "scenes:val?count=24&size=48", model="untrained", settings=settings)
