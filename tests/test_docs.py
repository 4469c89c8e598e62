"""What the documents point at is there, and the recipes and settings they name exist."""

import re
from pathlib import Path

import pytest

from harmony import recipe as recipes
from harmony import recipe_files

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
        assert f"| `{name}` |" in text, name


def test_every_quirk_in_the_method_is_an_option_that_the_recipe_takes():
    """Each `key=value` of the table of repairs can be given to the repaired method."""
    page = (ROOT / "docs" / "method.md").read_text().partition("## Repairs")[2]
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    options = re.findall(r"`((?:objectives|model|optim|data)\.[\w.]+=[^`]+)`", table)
    assert len(options) >= 12
    for option in options:
        recipes.load("harmony", ["data.train=scenes:", option])
