import base64
import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs_for_evaluation import saved_run, tiny_recipe

from harmony.evaluation.encoders import load_encoder
from harmony.evaluation.report import pictures
from harmony.evaluation.report.attention import attention, heat
from harmony.evaluation.report.charts import Bar, Line, Mark, Plot, Scale, _tick, bars, chart, nice_step
from harmony.evaluation.report.html import Html, number, percent, tag
from harmony.evaluation.report.log import Curve, Log, smoothed, thinned
from harmony.evaluation.report.results import short_uri
from harmony.models.trunk import create_trunk
from harmony.models.vision import Segment
from harmony.objectives.mae import Mae

FLOATS = st.floats(-1e6, 1e6, allow_nan=False)


def log_of(tmp_path, *lines):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return Log.read(path)


def test_a_log_is_read_in_order_and_the_last_line_of_a_step_counts(tmp_path):
    log = log_of(
        tmp_path,
        {"step": 2, "loss": 2.0, "loss/mae": None},
        {"step": 1, "loss": 1.0},
        "not json\n",
        {"step": 2, "loss": 3.0, "loss/mae": 0.5},
        '{"step": 3, "lo',
    )
    assert log.curve("loss") == Curve([1, 2], [1, 3])
    assert log.under("loss") == {"mae": Curve([2], [0.5])}
    assert log.last("nothing") is None
    assert log.damaged == 2
    assert not Log.read(tmp_path / "absent.jsonl").lines


def test_training_time_is_added_up_from_the_throughput(tmp_path):
    log = log_of(
        tmp_path,
        {"step": 1, "examples": 10, "examples_per_second": 5},
        {"step": 2, "examples": 40, "examples_per_second": 10},
    )
    assert log.training_seconds() == 10 / 5 + 30 / 10


@given(st.lists(FLOATS, min_size=1, max_size=60), st.integers(1, 70))
def test_a_thinned_curve_keeps_its_mean_and_its_range(values, most):
    curve = Curve([float(i) for i in range(len(values))], values)
    thin = thinned(curve, most)
    assert len(thin.steps) == len(thin.values) == min(most, len(values))
    assert thin.steps == sorted(thin.steps)
    assert min(values) - 1e-6 <= min(thin.values) <= max(thin.values) <= max(values) + 1e-6
    if len(values) % most == 0:
        assert sum(thin.values) / most == pytest.approx(sum(values) / len(values), abs=1e-6)


@given(st.lists(FLOATS, min_size=1, max_size=200))
def test_a_smoothed_curve_stays_within_its_values(values):
    curve = Curve([float(i) for i in range(len(values))], values)
    smooth = smoothed(curve)
    assert smooth.steps == curve.steps
    slack = 1e-9 * max(map(abs, values))
    assert all(min(values) - slack <= value <= max(values) + slack for value in smooth.values)
    straight = smoothed(Curve(curve.steps, curve.steps))
    assert straight.values == pytest.approx(curve.steps)  # a straight line stays what it is, to its very ends


@given(st.lists(FLOATS, min_size=1, max_size=20), st.lists(FLOATS, max_size=2))
def test_a_scale_holds_its_values(values, marks):
    scale = Scale.around(values, marks)
    assert scale.low <= min(values) + 1e-6 * scale.step
    assert scale.high >= max(values) - 1e-6 * scale.step
    assert 2 <= len(scale.ticks()) <= 8
    assert scale.ticks()[-1] == pytest.approx(scale.high, rel=1e-9, abs=1e-9)


@given(st.floats(1e-9, 1e9))
def test_steps_are_round_and_not_much_larger_than_asked(rough):
    step = nice_step(rough)
    assert rough * (1 - 1e-6) <= step <= 2.5 * rough
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(nice) for nice in (1, 2, 2.5, 5, 10))


def test_a_plot_puts_values_where_they_belong():
    plot = Plot(Scale(0, 10, 5), first=1, last=101)
    assert plot.y(0) > plot.y(5) > plot.y(10)
    assert plot.y(5) == pytest.approx((plot.y(0) + plot.y(10)) / 2)
    assert plot.x(51) == pytest.approx((plot.x(1) + plot.x(101)) / 2)


def test_a_chart_of_a_single_point_and_one_of_a_constant_can_be_drawn():
    assert "<circle" in chart("loss", "", [Line("loss", Curve([3], [0.5]))])
    assert "<path" in chart("loss", "", [Line("loss", Curve([1, 2], [0.0, 0.0]))], [Mark(4.0, "far away")])


def test_shares_that_are_all_zero_or_one_stay_on_an_axis_of_shares():
    assert (Scale.around([0.0, 0.0], share=True).low, Scale.around([0.0], share=True).high) == (0, 1)
    assert Scale.around([1.0, 1.0], share=True).high == pytest.approx(1)
    assert Scale.around([0.0, 0.0]).low < 0
    assert "-100 %" not in chart("words named", "", [Line("mlm", Curve([1, 2], [0.0, 0.0]))], share=True)


def test_a_mark_far_from_the_curve_does_not_flatten_it():
    near = chart("loss", "", [Line("loss", Curve([1, 2], [1.0, 2.0]))], [Mark(2.5, "a bound")])
    far = chart("loss", "", [Line("loss", Curve([1, 2], [1.0, 2.0]))], [Mark(1000, "a bound")])
    assert "a bound" in near
    assert "a bound" not in far


def test_bars_are_as_long_as_their_shares():
    drawn = bars([Bar("red", 0.25, "of 4"), Bar("blue", None, "of 0")], chance=0.125)
    assert drawn.count("width:25.00%") == 1
    assert drawn.count("left:12.50%") == 2
    assert drawn.count("<i") == 1


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0 %"), (1, "100.0 %"), (0.8431, "84.3 %"), (0.001, "0.1 %"), (0.000123, "0.012 %")]
)
def test_percent(share, shown):
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12345.6, "12,346"), (3.14159, "3.142"), (0.05, "0.05"), (0.000420, "4.20e-4"), (-2.5, "-2.5")],
)
def test_number(value, shown):
    assert number(value) == shown


def test_tags_escape_what_is_not_html():
    made = tag("p", "<b>", Html("<i></i>"), 3, title='"quoted"', class_="x", data_y=None)
    assert made == '<p title="&quot;quoted&quot;" class="x">&lt;b&gt;<i></i>3</p>'


def test_an_embedded_image_is_the_image():
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    pixels[0, :, 20:] = 255
    kind, _, data = pictures.data_uri(pixels, 20).partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64"
    assert image.size == (20, 20)
    assert image.getpixel((3, 10))[0] < 20
    assert image.getpixel((16, 10))[0] > 235


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), tiny_recipe())


def test_equal_patches_have_equal_colours_in_all_images(run):
    encoder = load_encoder(str(run.folder), device="cpu")
    torch.manual_seed(0)
    one, two = torch.rand(2, 3, 32, 32)
    colours = pictures.patch_colours([encoder], torch.stack([one, two, one, one]))[0]
    assert colours.shape == (4, 3, 32, 32)
    assert colours.dtype == torch.uint8
    torch.testing.assert_close(colours[0], colours[2], atol=1, rtol=0)
    assert (colours[0].int() - colours[1].int()).abs().float().mean() > 10


def test_colours_are_the_leading_principal_components(run):
    encoder = load_encoder(str(run.folder), device="cpu")
    torch.manual_seed(0)
    pixels = torch.rand(5, 3, 32, 32)
    features = encoder.towers.image.encode(pixels).patches.flatten(0, 1).double()
    left, values, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    centres = pictures.patch_colours([encoder], pixels)[0, :, :, 4::8, 4::8].permute(0, 2, 3, 1).reshape(-1, 3).double()
    for channel in range(3):
        component = left[:, channel] * values[channel]
        correlation = torch.corrcoef(torch.stack([component, centres[:, channel]]))[0, 1]
        assert correlation.abs() > 0.9  # clipping and interpolation cost a little


def test_student_and_teacher_share_their_colours(run):
    student, teacher = (load_encoder(str(run.folder), model, "cpu") for model in ("student", "teacher"))
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same = pictures.patch_colours([teacher, teacher], pixels)
    torch.testing.assert_close(same[0], same[1], atol=1, rtol=0)
    both = pictures.patch_colours([student, teacher], pixels)
    assert (both[0].int() - both[1].int()).abs().float().mean() > 3
    turned = pictures.patch_colours([teacher, student], pixels)
    torch.testing.assert_close(both, turned.flip(0), atol=1, rtol=0)


@pytest.mark.parametrize("side", [32, 48])
def test_attention_is_what_timm_computes(run, side):
    """timm's own unfused attention hands its weights to a dropout, where they can be seen."""
    tower = load_encoder(str(run.folder), device="cpu").towers.image
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    maps = attention(tower, pixels)
    trunk = create_trunk(run.recipe.model.image, 32)
    trunk.load_state_dict(tower.trunk.state_dict())
    if side != 32:
        trunk.set_input_size(img_size=(side, side))
    last, seen = trunk.eval().blocks[-1].attn, []
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        trunk(pixels)
    expected = seen[0][:, :, 0, 1:].unflatten(2, (side // 8, side // 8))
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    assert (maps.sum((2, 3)) < 1).all()
    assert not tower.trunk.blocks[-1].attn.qkv._forward_hooks


def test_heat_is_darkest_at_the_lowest_and_brightest_at_the_highest():
    colours = heat(torch.tensor([[0.1, 0.1], [0.3, 0.3]]), 8, 0.1, 0.3).float().mean(0)
    assert colours[0].max() < 20
    assert colours[-1].min() > 200
    assert (colours[1:] - colours[:-1] >= -1).all()


def test_reconstructions_keep_what_was_seen_and_fill_in_the_rest(run):
    encoder = load_encoder(str(run.folder), "student", "cpu")
    mae = run.learner.objectives["mae"]
    assert isinstance(mae, Mae)
    torch.manual_seed(0)
    original = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    masked, filled = pictures.reconstructions(encoder, mae.eval(), encoder.normalise(original))
    tiles = [image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5) for image in (original, masked, filled)]
    grey = (tiles[1] == pictures.GREY).all(-1).all(-1).all(-1)  # (4, rows, columns)
    assert grey.flatten(1).sum(1).tolist() == [12] * 4  # three quarters of 16
    assert tiles[1][~grey].equal(tiles[0][~grey])
    assert tiles[2][~grey].equal(tiles[0][~grey])
    assert (tiles[2][grey].int() - tiles[0][grey].int()).abs().float().mean() > 10


def test_reconstructions_are_those_of_the_objective(run):
    """A decoder that knows the answer gives the images back."""
    encoder = load_encoder(str(run.folder), "student", "cpu")
    mae = run.learner.objectives["mae"]
    original = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = encoder.normalise(original)

    class Knowing(Mae):
        def _predict(self, tokens, prefix, mask):
            assert tokens.equal(encoder.towers.image.encode_packed([Segment(pixels, keep=mask.kept[0])])[0].tokens)
            return self.targets(pixels, mask)

    knowing = Knowing(mae.config, encoder.towers, run.recipe.views)
    _, filled = pictures.reconstructions(encoder, knowing, pixels)
    assert (filled.int() - original.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("values", "share", "labels"),
    [
        ([0.0, 12.4], False, ["0", "5", "10", "15"]),
        ([3.0, 10.0], False, ["2.5", "5.0", "7.5", "10.0"]),
        ([0.0700, 0.0713], False, ["0.0700", "0.0705", "0.0710", "0.0715"]),
        ([0.0, 5.1e-4], False, ["0", "2e-4", "4e-4", "6e-4"]),
        ([1e6, 2.5e6], False, ["1.0e6", "1.5e6", "2.0e6", "2.5e6"]),
        ([0.1, 0.55], True, ["0 %", "20 %", "40 %", "60 %"]),
    ],
)
def test_ticks_tell_each_other_apart(values, share, labels):
    scale = Scale.around(values)
    assert [_tick(tick, scale, share) for tick in scale.ticks()] == labels


def test_the_label_of_a_mark_stands_where_no_curve_runs():
    steps = [float(i) for i in range(100)]
    falling, rising = Curve(steps, [10 - s / 11 for s in steps]), Curve(steps, [1 + s / 11 for s in steps])
    assert 'class="start marked"' in chart("loss", "", [Line("loss", falling)], [Mark(1.2, "clipped above")])
    assert 'class="end marked"' in chart("loss", "", [Line("loss", rising)], [Mark(1.2, "clipped above")])


def test_a_long_uri_keeps_the_file_it_names():
    long = "coco:/data/sets/mini/instances.json?images=/data/sets/mini/images"
    assert short_uri(long) == "coco: …/mini/instances.json?images=…/mini/images"
    assert short_uri("shards:/data/pairs/train-{0..1}.tar") == "shards: …/pairs/train-{0..1}.tar"
    assert short_uri("scenes:val?size=40&count=8") == "scenes:val?size=40&count=8"
