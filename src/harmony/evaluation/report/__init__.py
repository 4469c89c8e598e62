"""The report of a run: one self-contained report.html, drawn from what lies in the run's directory."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harmony import recipe as recipes
from harmony.data.sources import Source, open_source
from harmony.errors import UserError
from harmony.evaluation.encoders import TowersEncoder, find_checkpoint, load_part, load_run
from harmony.evaluation.features import Crops, Read, spread
from harmony.evaluation.report import curves, facts, pictures
from harmony.evaluation.report import results as shown
from harmony.evaluation.report.html import Html, Section, note, tag
from harmony.evaluation.report.log import Log
from harmony.evaluation.report.style import CSS, SCRIPT
from harmony.evaluation.results import read_details, read_metrics
from harmony.objectives.mae import Mae
from harmony.recipe import Recipe
from harmony.training import checkpoints

COLOURED, RECONSTRUCTED = 8, 6
"""Images with colour maps and with reconstructions."""

THUMBNAIL = 128
"""Side in px of the images among the retrievals."""


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir`/report.html. A part that the run does not have is left out, or replaced by a sentence.

    Raises:
        UserError: there is no run in the directory.
    """
    folder = Path(run_dir)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} holds no run (it has no recipe.yaml); name a directory that `harmony train` wrote")
    page = _page(folder)
    target, aside = folder / "report.html", folder / f".report.html.{os.getpid()}"
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def _page(folder: Path) -> str:
    recipe, log, metrics = recipes.load(folder / "recipe.yaml"), Log.read(folder / "log.jsonl"), read_metrics(folder)
    checkpoint = _checkpoint(folder)
    state = facts.read_state(checkpoint)
    retrieval, zero_shot = read_details(folder, "retrieval"), read_details(folder, "zero_shot")
    sections = [
        shown.results(metrics, folder),
        curves.losses(log, recipe),
        curves.signs(log, recipe),
        *_drawn(folder, recipe, checkpoint),
        shown.retrievals(retrieval, _thumbnails(recipe, retrieval)),
        shown.classes(zero_shot, metrics.get("zero_shot", {})),
        curves.optimisation(log, recipe),
        curves.speed(log, recipe),
        facts.whole_recipe(recipe, state, _count_lines(folder / "bad_examples.jsonl")),
    ]
    head = facts.head(
        folder.resolve().name, recipe, log, state, checkpoint / "model.safetensors" if checkpoint else None
    )
    return document(f"{folder.resolve().name} · Harmony", head, [section for section in sections if section])


def _checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, or None before the first."""
    try:
        return find_checkpoint(str(folder))
    except UserError:
        return None


def _drawn(folder: Path, recipe: Recipe, checkpoint: Path | None) -> list[Section]:
    """The sections for which the towers must look at images: colour maps and reconstructions."""
    if checkpoint is None or recipe.data.val is None:
        return []
    try:
        source = open_source(recipe.data.val, recipe.data.options)
        teacher, student = load_run(str(folder), "teacher", "cpu"), load_run(str(folder), "student", "cpu")
    except UserError as error:
        return [Section("features", "What the patches mean", note(f"Nothing can be drawn: {error}."))]
    read = _read(source, spread(len(source), COLOURED), recipe, recipe.largest_view)
    if read.pixels is None:
        return [Section("features", "What the patches mean", note(f"No image of {source.uri} can be read."))]
    portraits = _read(source, read.indices, recipe, pictures.fine_size(teacher)).pixels
    assert portraits is not None
    colours = pictures.patch_colours(teacher, teacher.normalise(portraits))
    sections = [pictures.colour_section(list(portraits), colours)]
    mae = _mae(recipe, student, checkpoint)
    if mae is not None:
        originals = read.pixels[:RECONSTRUCTED]
        masked, filled = pictures.reconstructions(student, mae, student.normalise(originals))
        sections.append(pictures.reconstruction_section(list(originals), masked, filled))
    return sections


def _mae(recipe: Recipe, student: TowersEncoder, checkpoint: Path) -> Mae | None:
    """The recipe's reconstruction objective as trained, if it has one."""
    for name, config in recipe.objectives.items():
        if isinstance(config, Mae.Config):
            mae = Mae(config, student.towers, recipe.views).eval()
            load_part(mae, checkpoints.read_model(checkpoint), f"objectives.{name}", str(checkpoint))
            return mae
    return None


def _thumbnails(recipe: Recipe, details: Mapping[str, Any] | None) -> dict[int, str]:
    """The images that the retrievals show, as data URIs, by their positions in the source."""
    wanted = shown.shown_images(details)
    if not wanted or not details:
        return {}
    try:
        source = open_source(str(details.get("data")), recipe.data.options)
    except UserError:
        return {}
    read = _read(source, [index for index in wanted if index < len(source)], recipe, THUMBNAIL)
    crops = [] if read.pixels is None else list(read.pixels)
    return {index: pictures.data_uri(crop) for index, crop in zip(read.indices, crops, strict=True)}


def _read(source: Source, positions: Sequence[int], recipe: Recipe, size: int) -> Read:
    """Those of the examples that can be read, cut to squares of `size` px."""
    return Crops(source, positions, size, recipe.data.max_pixels, len(positions))[0] if positions else Read()


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.exists() else 0


def document(title: str, head: Html, sections: Iterable[Section]) -> str:
    """The whole page."""
    every = list(sections)
    links = [tag("a", section.title, href=f"#{section.name}") for section in every]
    body = [
        tag("nav", tag("div", *links)),
        tag("main", head, *(section.html() for section in every), tag("footer", "Written by harmony report.")),
        tag("script", Html(SCRIPT)),
    ]
    top = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(CSS)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *top), tag('body', *body), lang='en')}\n"
