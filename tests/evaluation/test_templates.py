import pytest

from harmony.errors import UserError
from harmony.evaluation.templates import load_templates, prompts


@pytest.mark.parametrize(("name", "count", "one"), [("plain", 6, "a {}"), ("openai", 80, "a photo of a {}.")])
def test_sets_by_name(name, count, one):
    templates = load_templates(name)
    assert len(templates) == len(set(templates)) == count
    assert one in templates
    assert all(template.count("{}") == 1 for template in templates)


def test_prompts_hold_the_name():
    assert prompts("red {fox}", ("a {}", "{} here")) == ["a red {fox}", "red {fox} here"]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match=r"unknown templates 'opnai'; did you mean 'openai'\?"):
        load_templates("opnai")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n# only a remark\n", "is empty"), (b"a {}\na photo\n", "'a photo' in .* has no {}"), (b"\xff\xfe{}", "UTF-8")],
)
def test_files_that_do_not_serve(tmp_path, content, message):
    file = tmp_path / "templates.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_templates(str(file))
