"""What the documents point at is there, and the recipes and settings they name exist."""

import re
from pathlib import Path

import pytest

from harmony import recipe as recipes
from harmony import recipe_files, recipe_list
from harmony.data.sources import KINDS
from harmony.data.sources.coco import CocoSettings
from harmony.data.sources.flickr import FlickrSettings
from harmony.data.sources.masks import MaskSettings
from harmony.data.sources.npz import NpzSettings
from harmony.evaluation.settings import TASKS, EvaluationConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    for target in targets:
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_readme_lists_every_recipe():
    text = (ROOT / "README.md").read_text()
    for name in recipe_files.names():
        assert f"`{name}`" in text, name


def test_the_readme_tells_what_each_method_costs():
    rows = re.findall(r"^\| `([\w-]+)`.*\| (\d+\.\d) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: f"{told['cost']:.1f}" for name, told in recipe_list.facts().items()}


def test_every_quirk_in_the_method_is_an_option_that_the_recipe_takes():
    """Each `key=value` of the table of repairs can be given to the repaired method."""
    page = (ROOT / "docs" / "method.md").read_text().partition("## Repairs")[2]
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    options = re.findall(r"`((?:objectives|model|optim|data)\.[\w.]+=[^`]+)`", table)
    assert len(options) >= 12
    for option in options:
        recipes.load("harmony", ["data.train=scenes:", option])


def test_every_kind_of_data_and_every_setting_of_it_is_described():
    text = (ROOT / "docs" / "data.md").read_text()
    for kind in KINDS:
        assert f"| `{kind}:" in text, kind
    for settings in (NpzSettings, CocoSettings, FlickrSettings, MaskSettings):
        for name in settings.model_fields:
            assert f"{name}=" in text or f"| `{name}` |" in text, name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_page_with_every_setting(task: str):
    page = (ROOT / "docs" / "evaluation" / f"{task}.md").read_text()
    assert f"--task {task}" in page
    for name in type(getattr(EvaluationConfig(), task)).model_fields:
        assert f"`{name}`" in page or f"{name}=" in page, name
    assert f"(docs/evaluation/{task}.md)" in (ROOT / "README.md").read_text()
