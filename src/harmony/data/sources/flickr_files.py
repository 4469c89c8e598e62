"""The forms in which captions of Flickr8k, Flickr30k and COCO are passed on.

name.jpg#0<TAB>caption                  Flickr8k.token.txt, results_20130124.token
image,caption                           captions.txt: a header, then lines whose captions may hold commas
image_name| comment_number| comment     results.csv, likewise with bars
{"images": [{"filename", "split", "sentences": [{"raw"}]}]}     Karpathy's json, with splits
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony.data.sources.noted import Noted
from harmony.errors import UserError

_TOKEN = re.compile(r"^([^\t]+)#\d+\t(.*)$")
_FORMS = (
    "NAME#0<TAB>CAPTION lines, a header `image,caption` or `image_name| comment_number| comment`, or Karpathy's json"
)


@dataclass
class Captioned:
    """An image as a caption file has it: the path of its file, its captions, and its split where there are splits."""

    name: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None


def read_captions(path: Path, noted: Noted) -> list[Captioned]:
    """The images of a caption file in the order of their first lines, each with its captions.

    Lines of another form and images without a caption are left out and counted in `noted`.

    Raises:
        UserError: the file has none of the forms.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); convert it") from error
    if text.lstrip()[:1] == "{":
        return list(_karpathy(text, path, noted))
    lines = text.splitlines()
    head, line_of = _form(lines[0] if lines else "", path)
    images: dict[str, Captioned] = {}
    for number, line in enumerate(lines[head:], head + 1):
        found = line_of(line)
        if found and found[0] and found[1].split():
            name, caption = found
            images.setdefault(name, Captioned(name)).captions.append(" ".join(caption.split()))
        elif line.strip():
            noted.add("lines without a name or a caption (left out)", f"line {number}")
    return list(images.values())


def _form(first: str, path: Path) -> tuple[int, Callable[[str], tuple[str, str] | None]]:
    """How many lines are header, and what takes a line apart."""
    columns = [column.strip().lower() for column in re.split(r"[|,]", first)]
    if columns == ["image_name", "comment_number", "comment"]:
        return 1, _bars if "|" in first else _commas_numbered
    if columns in (["image", "caption"], ["image_name", "caption"]):
        return 1, _commas
    if _TOKEN.match(first):
        return 0, _token
    raise UserError(f"{path} begins with {first[:60]!r}, which is no list of captions; give {_FORMS}")


def _token(line: str) -> tuple[str, str] | None:
    match = _TOKEN.match(line)
    return (match[1].strip(), match[2]) if match else None


def _bars(line: str) -> tuple[str, str] | None:
    parts = line.split("|", 2)
    return (parts[0].strip(), parts[2]) if len(parts) == 3 else None


def _commas(line: str) -> tuple[str, str] | None:
    name, comma, caption = line.partition(",")
    return (name.strip(), _unquoted(caption)) if comma else None


def _commas_numbered(line: str) -> tuple[str, str] | None:
    parts = line.split(",", 2)
    return (parts[0].strip(), _unquoted(parts[2])) if len(parts) == 3 else None


def _unquoted(caption: str) -> str:
    """A caption without the quotes that csv puts around one with commas."""
    caption = caption.strip()
    if len(caption) > 1 and caption[0] == caption[-1] == '"':
        return caption[1:-1].replace('""', '"')
    return caption


def _karpathy(text: str, path: Path, noted: Noted) -> Iterator[Captioned]:
    try:
        images = json.loads(text).get("images")
    except ValueError as error:
        raise UserError(f"{path} is no json ({error}); give {_FORMS}") from error
    if not isinstance(images, list) or not all(isinstance(image, dict) and "sentences" in image for image in images):
        raise UserError(
            f"{path} has no list 'images' with 'sentences', as Karpathy's json has; for COCO's own files write coco:"
        )
    for image in images:
        name = image.get("filename")
        captions = [" ".join(raw.split()) for raw in map(_raw, image["sentences"]) if raw.split()]
        if not isinstance(name, str) or not captions:
            noted.add("images without a name or a caption (left out)", str(name))
            continue
        folder = image.get("filepath")
        yield Captioned(f"{folder}/{name}" if folder else name, captions, image.get("split"))


def _raw(sentence: Any) -> str:
    raw = sentence.get("raw") if isinstance(sentence, dict) else sentence
    return raw if isinstance(raw, str) else ""
