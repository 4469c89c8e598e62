import json
import shutil

import pytest
from browser import CHROMIUM, opened, parsed
from runs_for_evaluation import SavedRun, saved_run, tiny_recipe, write_log

from harmony.errors import UserError
from harmony.evaluation.report import write_report
from harmony.evaluation.results import read_details, write_details, write_metrics
from harmony.evaluation.tasks import evaluate_run
from harmony.training.cost import cost_of

SECTIONS = [
    "Results",
    "Losses",
    "Signs of health",
    "What the patches mean",
    "Where the class token looks",
    "Reconstructions",
    "Zero-shot classification",
    "Retrieval",
    "Optimisation",
    "Cost and speed",
    "Recipe",
]


@pytest.fixture(scope="module", autouse=True)
def each_recipe_is_counted_once():
    """Counting what a recipe costs takes seconds; here many reports are written on the same few recipes."""
    known = {}

    def remembered(recipe):
        text = recipe.to_yaml()
        if text not in known:
            known[text] = cost_of(recipe)
        return known[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmony.evaluation.report.cost.cost_of", remembered)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, each_recipe_is_counted_once):
    """A run that was trained, measured and reported on."""
    run = saved_run(tmp_path_factory.mktemp("runs") / "quick <b>&", tiny_recipe())
    write_log(run)
    evaluate_run(run.folder, run.recipe)
    write_report(run.folder)
    return run


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return SavedRun(tmp_path / "run", finished.checkpoint, finished.recipe, finished.learner)


def report_of(run):
    return parsed(write_report(run.folder).read_text(encoding="utf-8"))


def test_the_page_opens_without_errors_and_has_every_section(finished, tmp_path):
    seen = opened(finished.folder / "report.html", tmp_path)
    assert seen.errors == []
    assert seen.headings == SECTIONS
    anchors = {attributes["id"] for attributes in seen.named("section")}
    assert {link["href"] for link in seen.named("a")} == {f"#{anchor}" for anchor in anchors}
    assert not [a["src"] for a in seen.named("img", "script") if not a.get("src", "data:").startswith("data:")]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: only a browser runs the page's script")
def test_charts_tell_their_values_and_errors_would_be_seen(finished, tmp_path):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    hover = """<script>
      const chart = document.querySelector("svg[data-chart]"), box = chart.getBoundingClientRect();
      const place = { clientX: box.right - 8, clientY: box.top + 40 };
      chart.dispatchEvent(new PointerEvent("pointermove", place));
    </script>"""
    (tmp_path / "hover.html").write_text(page.replace("</body>", hover + "</body>"), encoding="utf-8")
    seen = opened(tmp_path / "hover.html", tmp_path)
    assert seen.errors == []
    assert len(seen.of_class("tip")) == 1
    assert "step 200" in seen.text  # the last logged step
    (tmp_path / "broken.html").write_text(page.replace("</body>", "<script>gone()</script></body>"), encoding="utf-8")
    assert "gone is not defined" in str(opened(tmp_path / "broken.html", tmp_path).errors)


def test_the_page_stands_alone_and_is_small(finished):
    path = finished.folder / "report.html"
    seen = parsed(path.read_text(encoding="utf-8"))
    assert seen.errors == []
    sources = [attributes[key] for _, attributes in seen.elements for key in ("src", "href") if key in attributes]
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not seen.named("link", "iframe", "object", "base")
    style = path.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert path.stat().st_size < 5e6


def test_everything_from_outside_is_escaped(copied):
    details = read_details(copied.folder, "retrieval")
    details["text_to_image"]["best"][0]["caption"] = "<script>alert(1)</script> & \"'"
    write_details(copied.folder, "retrieval", details)
    write_metrics(copied.folder, "retrieval", {"<i>metric": 0.5})
    before = len(report_of(copied).named("script", "i"))
    details["text_to_image"]["best"][0]["caption"] = "harmless"
    write_details(copied.folder, "retrieval", details)
    write_metrics(copied.folder, "retrieval", {"metric": 0.5})
    assert before == len(report_of(copied).named("script", "i"))


def test_a_name_with_markup_is_shown_as_it_is(finished):
    assert "quick <b>&" in parsed((finished.folder / "report.html").read_text(encoding="utf-8")).text


def test_headlines_stand_beside_their_chance_levels(copied):
    write_metrics(copied.folder, "zero_shot", {"top1": 0.8431, "chance_top1": 0.0156})
    text = report_of(copied).text
    assert "84.3 %" in text
    assert "54 times the chance of 1.6 %" in text


def test_tasks_stand_in_one_table_with_chance_and_what_papers_report(copied):
    write_metrics(copied.folder, "detection", {"box_ap": 0.123, "mask_ap": 0.045})
    write_metrics(copied.folder, "knn", {"top1@20": 0.5, "top1@10": 0.4, "chance_top1": 0.25})
    seen = report_of(copied)
    rows = seen.text[seen.text.index("for orientation") : seen.text.index("What papers report")]
    order = ["Zero-shot", "Retrieval", "Nearest neighbours", "Detection"]
    assert sorted(order, key=rows.index) == order
    assert "top-1 accuracy, k = 2050.0 %25.0 %76.1 %" in rows  # beside DINO's
    assert "box AP12.3 %51.6 %" in rows
    assert "mask AP4.5 %45.9 %" in rows
    assert "arXiv 2203.16527" in seen.text


def test_the_cost_of_each_objective_adds_up(copied):
    text = report_of(copied).text
    cost = text[text.index("Cost of a pair") : text.index("Every encoder pass")]
    assert all(name.replace("_", " ") in cost for name in copied.recipe.objectives)
    parameters = sum(p.numel() for p in copied.learner.parameters() if p.requires_grad)
    assert f"all that is trained{parameters:,}" in cost


def test_retrievals_show_five_images_and_outline_the_right_one(copied):
    details = read_details(copied.folder, "retrieval")
    queries = details["text_to_image"]["best"] + details["text_to_image"]["worst"]
    seen = report_of(copied)
    assert len(seen.of_class("query")) == len(queries) == 12
    assert len(seen.of_class("own")) == len(queries)
    behind = sum(query["rank"] > 5 for query in queries)
    assert len(seen.of_class("dots")) == behind
    assert sum("similarity" in a.get("alt", "") or "rank" in a.get("alt", "") for a in seen.named("img")) == 60 + behind


def test_every_class_has_a_bar(copied):
    objectives = len(copied.recipe.objectives)  # these have bars too, of what they cost
    assert len(report_of(copied).of_class("bar")) == 64 + objectives


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        (["log.jsonl"], [s for s in SECTIONS if s not in ("Signs of health", "Optimisation")]),
        (["metrics.json", "evaluation"], [s for s in SECTIONS if s not in SECTIONS[6:8]]),
        (["checkpoints"], [s for s in SECTIONS if s not in SECTIONS[3:6]]),
        (["log.jsonl", "metrics.json", "evaluation", "checkpoints"], ["Results", "Losses", "Cost and speed", "Recipe"]),
    ],
)
def test_what_is_missing_is_left_out(copied, missing, sections):
    for name in missing:
        path = copied.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    seen = report_of(copied)
    assert seen.errors == []
    assert seen.headings == sections


def test_a_recipe_of_images_alone(tmp_path):
    gone = [f"objectives.{name}=null" for name in ("clip", "mae", "mlm", "text_distillation")]
    run = saved_run(tmp_path / "run", tiny_recipe("model.text=null", *gone))
    write_log(run)
    seen = report_of(run)
    assert seen.errors == []
    assert seen.headings == ["Results", *SECTIONS[1:5], *SECTIONS[8:]]
    # Six images with the colours and the attention of two models, and two of them with both heads of the teacher.
    assert len(seen.named("img")) == 6 * 3 + 6 * 3 + 2 * 3


def test_no_validation_data(tmp_path):
    run = saved_run(tmp_path / "run", tiny_recipe("data.val=null"))
    write_log(run)
    assert report_of(run).headings == ["Results", *SECTIONS[1:3], *SECTIONS[8:]]
    page = (run.folder / "report.html").read_text()
    assert f"<code>harmony evaluate {run.folder} --task zero_shot --data URI --out {run.folder}</code>" in page
    assert "`harmony" not in page


def test_data_that_are_gone_are_mentioned(copied):
    recipe = (copied.folder / "recipe.yaml").read_text()
    (copied.folder / "recipe.yaml").write_text(recipe.replace("scenes:val?count=24", "shards:gone/val.tar"))
    details = read_details(copied.folder, "retrieval")
    write_details(copied.folder, "retrieval", details | {"data": "shards:gone/val.tar"})
    text = report_of(copied).text
    assert "Nothing can be drawn: shards:gone/val.tar names no shards" in text
    assert "no longer where they were evaluated" in text


def test_values_that_are_not_finite_and_half_a_line(copied):
    with (copied.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 205, "loss": None, "loss/mae": None}) + '\n{"step": 206, "lo')
    seen = report_of(copied)
    assert seen.errors == []
    assert seen.headings == SECTIONS


def test_a_long_run_makes_no_larger_page(copied):
    size = write_report(copied.folder).stat().st_size
    write_log(copied, lines=5000)
    assert write_report(copied.folder).stat().st_size < 1.5 * size + 300_000


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(UserError, match=r"neither a run .* nor results"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_told_in_one_sentence(copied):
    weights = max(copied.folder.glob("checkpoints/*")) / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        report_of(copied)
