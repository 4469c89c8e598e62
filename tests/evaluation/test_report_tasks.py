"""The report's section of each task, and reports of results without a run."""

import base64
import io

import numpy as np
import pytest
import report_details as kept
from browser import opened, parsed
from PIL import Image

from harmony.cli import main
from harmony.evaluation.report import papers, write_report
from harmony.evaluation.report.boxes import tinted
from harmony.evaluation.report.images import Images
from harmony.evaluation.report.palette import colour
from harmony.evaluation.report.segments import painted
from harmony.evaluation.report.words import HEADLINES, TASKS, metric
from harmony.evaluation.results import write_details, write_metrics
from harmony.evaluation.settings import TASKS as ALL

URI = "scenes:val?count=8&size=48"
NAMES = [f"thing {i}" for i in range(8)]


def accuracies(value):
    return {"top1": value, "top5": 0.9, "mean_per_class": value, "chance_top1": 0.125}


@pytest.fixture
def results(tmp_path):
    """What `harmony evaluate --out` leaves of five tasks, measured in no particular order."""
    folder = tmp_path / "results"
    for task, metrics, details in (
        ("detection", {"box_ap": 0.4, "mask_ap": 0.3}, kept.detection(URI)),
        ("segmentation", {"miou": 0.5, "pixel_accuracy": 0.8}, kept.segmentation(URI)),
        ("linear", accuracies(0.6), kept.linear(URI, NAMES)),
        ("knn", {f"top1@{k}": 0.5 - k / 1000 for k in (10, 20, 100)} | {"chance_top1": 0.125}, kept.about(URI)),
        ("fine_tune", accuracies(0.7), kept.about(URI) | kept.classification(NAMES) | {"curve": [[1, 2.0], [9, 1.0]]}),
    ):
        write_metrics(folder, task, metrics)
        write_details(folder, task, details)
    return folder


def report_of(folder):
    return parsed(write_report(folder).read_text(encoding="utf-8"))


def pixels_of(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def test_results_without_a_run_have_a_page_that_opens(results, tmp_path):
    seen = opened(write_report(results), tmp_path)
    assert seen.errors == []
    tasks = ["Nearest neighbours", "Linear probe", "Fine-tuning", "Semantic segmentation", "Detection"]
    assert seen.headings == ["Results", *tasks]
    assert "runs/tiny (teacher)" in seen.text
    anchors = {attributes["id"] for attributes in seen.named("section")}
    assert {link["href"] for link in seen.named("a")} == {f"#{anchor}" for anchor in anchors}
    pictures = [attributes.get("src") or attributes["href"] for attributes in seen.named("img", "image")]
    assert len(pictures) == 3 * 3 + 3 * (2 + 1)  # image, truth, prediction; two images and a mask
    assert all(source.startswith("data:image/") for source in pictures)
    assert seen.text.count("fewer epochs than the papers") == len(tasks)


def test_the_command_reports_on_results_and_refuses_an_empty_folder(results, tmp_path, capsys):
    assert main(["report", str(results)]) == 0
    assert (results / "report.html").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds neither a run (recipe.yaml) nor results (metrics.json)" in " ".join(capsys.readouterr().err.split())


def test_a_segmentation_shows_truth_and_prediction_in_the_colours_of_the_legend(results):
    details = kept.segmentation(URI)
    page = write_report(results).read_text()
    for example in details["examples"]:
        for which in ("truth", "predicted"):
            classes = np.array(Image.open(io.BytesIO(base64.b64decode(example[which]))))
            assert painted(classes) in page
            drawn = pixels_of(painted(classes))
            assert (drawn[..., 3] == 0).sum() == (classes == 255).sum()
            for index in np.unique(classes[classes < 255]):
                assert (drawn[classes == index][:, :3] == colour(index)).all()
                red, green, blue = colour(index)
                assert f"background:#{red:02x}{green:02x}{blue:02x}" in page
                assert details["names"][index] in page


def test_boxes_lie_where_the_details_say(results):
    details = kept.detection(URI)
    write_details(results, "detection", details)
    seen = report_of(results)
    outlines = seen.of_class("box")
    wanted = [thing["box"] for one in details["examples"] for thing in (*one["truth"], *one["predicted"][:-1])]
    assert len(outlines) == len(wanted)  # without the one of which the detector is not sure
    drawn = [[float(box[key]) * 48 / 320 for key in ("x", "y", "width", "height")] for box in outlines]
    expected = [[left, top, right - left, bottom - top] for left, top, right, bottom in wanted]
    np.testing.assert_allclose(sorted(drawn), sorted(expected), atol=0.02)
    assert seen.text.count(" 0.90") == len(wanted) // 2
    assert "0.10" not in seen.text


def test_a_mask_has_its_class_colour_and_leaves_the_rest_clear():
    mask = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    drawn = pixels_of(tinted(mask, [(0, 4), (2, 5)]))
    assert tuple(drawn[0, 1, :3]) == colour(4)
    assert tuple(drawn[1, 1, :3]) == colour(5)
    assert (drawn[..., 3] > 0).tolist() == [[False, True], [False, True]]


def test_boxes_without_masks(results):
    write_details(results, "detection", kept.detection(URI, masks=False))
    seen = report_of(results)
    assert seen.errors == []
    assert not seen.named("image")
    assert "of 5" in seen.text


def test_the_chosen_setting_of_the_grid_is_marked(results):
    seen = report_of(results)
    assert len(seen.of_class("tried")) == 1
    assert len(seen.of_class("chosen")) == 1
    page = (results / "report.html").read_text()
    row = page[page.index("last 4 blocks, class token<") :].partition("</tr>")[0]
    assert 'class="chosen"' in row
    assert "63.0 %" in row.partition('class="chosen"')[2].partition("</td>")[0]


def test_a_grid_of_learning_rates_with_a_setting_that_diverged(results):
    rates = [
        {"layers": 1, "pooling": "cls", "lr": 0.1, "validation_top1": 0.4, "chosen": True},
        {"layers": 1, "pooling": "cls", "lr": 1.0, "validation_top1": None, "chosen": False},
    ]
    write_details(results, "linear", kept.about(URI) | {"grid": rates})
    seen = report_of(results)
    assert seen.errors == []
    assert len(seen.of_class("chosen")) == 1


def test_every_class_has_its_bar_and_the_many_are_folded(results):
    many = [f"kind {i}" for i in range(60)]
    write_details(results, "fine_tune", kept.about(URI) | kept.classification(many, images=60))
    seen = report_of(results)
    labels = [attributes["title"] for attributes in seen.of_class("label") if "kind" in attributes.get("title", "")]
    assert sorted(labels) == sorted(many)
    assert "The 40 classes between them" in seen.text


def test_images_that_are_gone_and_examples_beyond_the_data(results):
    write_details(results, "segmentation", kept.segmentation(URI) | {"data": "folder:gone"})
    shorter = kept.detection(URI) | {"data": "scenes:val?count=1&size=48"}
    write_details(results, "detection", shorter)
    seen = report_of(results)
    assert seen.errors == []
    assert seen.text.count("not readable") == 3 + 2
    assert Images.of("folder:gone").squares([0], 8) == {}


def test_details_that_hold_nothing_to_show(results):
    for task in ("detection", "segmentation", "linear", "knn", "fine_tune"):
        write_details(results, task, {"model": "m", "data": URI})
    seen = report_of(results)
    assert seen.errors == []
    assert len(seen.headings) == 6
    (results / "evaluation" / "knn.json").unlink()
    assert len(report_of(results).headings) == 5


def test_a_long_list_of_classes_in_the_names_of_others_is_escaped(results):
    details = kept.segmentation(URI)
    write_details(results, "segmentation", details | {"names": ["<i>x", *details["names"][1:]]})
    assert "<i>x" in report_of(results).text


def test_every_task_has_words_and_papers_have_sources():
    assert set(TASKS) == set(HEADLINES) == set(ALL) == set(papers.PAPERS)
    for task, reported in papers.PAPERS.items():
        for one in reported:
            assert 0 < one.value < 1
            assert "arXiv" in one.source
            assert one.metric in HEADLINES[task]
    assert papers.first("detection", "box_ap50") is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("top1@20", "top-1 accuracy, k = 20"),
        ("text_to_image_recall@5", "text to image, recall@5"),
        ("box_ap", "box AP"),
        ("mask_ap75", "mask AP75"),
        ("box_ap_small", "box AP, small things"),
        ("mask_ap_l", "mask AP, large things"),
        ("box_ar_100", "box AR100"),
        ("miou", "mean IoU"),
        ("bad_examples", "bad examples"),
    ],
)
def test_metrics_have_names_for_people(name, shown):
    assert metric(name) == shown


def test_what_the_data_left_out_is_shown(tmp_path):
    left = "images that are not there (left out): 2, as <b>.jpg"
    details = kept.about(URI) | kept.classification(NAMES) | {"problems": {URI: [left]}}
    write_metrics(tmp_path, "linear", accuracies(0.5))
    write_details(tmp_path, "linear", details)
    assert f"{left} ({URI})" in parsed(write_report(tmp_path).read_text(encoding="utf-8")).text
