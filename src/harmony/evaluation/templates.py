"""Prompt templates: the sentences a class name is put in before the text tower reads it."""

from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES

from harmony.errors import UserError, unknown

PLAIN = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "an image of a {}",
    "there is a {}",
)

_NAMED = {
    "plain": PLAIN,
    # The 80 sentences of CLIP's ImageNet notebook (arXiv 2103.00020, section 3.1.4), kept by open_clip as functions.
    "openai": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}


def load_templates(name: str) -> tuple[str, ...]:
    """The templates of that name, or of that text file; each holds `{}` where the class name goes.

    Raises:
        UserError: there is neither a set nor a file of that name, or a line of the file has no place for the name.
    """
    if name in _NAMED:
        return _NAMED[name]
    if not Path(name).is_file():
        known = unknown("templates", name, _NAMED)
        raise UserError(f"{known} (a text file with one template a line serves too, but {name!r} is not a file)")
    return _from_file(Path(name))


def _from_file(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"the templates file {path} is not text in UTF-8; write one template a line") from None
    templates = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not templates:
        raise UserError(f"the templates file {path} is empty; write one template a line, such as: a photo of a {{}}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} in {path} has no {{}} where the class name goes; add it")
    return tuple(templates)


def prompts(class_name: str, templates: tuple[str, ...]) -> list[str]:
    """The class name in each of the templates."""
    return [template.replace("{}", class_name) for template in templates]
