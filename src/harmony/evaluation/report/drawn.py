"""The sections for which the towers of a run must look at images: features, attention, reconstructions."""

from pathlib import Path

from harmony.data.sources import open_source
from harmony.errors import UserError
from harmony.evaluation.crops import spread
from harmony.evaluation.encoders import TowersEncoder, load_run
from harmony.evaluation.report import alignment, attention, pictures
from harmony.evaluation.report.html import Section, note
from harmony.evaluation.report.images import squares
from harmony.objectives.clip import Clip
from harmony.objectives.filip import Filip
from harmony.objectives.mae import Mae
from harmony.recipe import Recipe
from harmony.training import checkpoints
from harmony.training.trained import load_part

COLOURED, RECONSTRUCTED = 6, 6
"""Images with colour maps and attention, and with reconstructions."""


def drawn(folder: Path, recipe: Recipe, checkpoint: Path | None) -> list[Section]:
    """All of them, as far as checkpoint and data allow; nothing before the first checkpoint or without images."""
    if checkpoint is None or recipe.data.val is None:
        return []
    try:
        source = open_source(recipe.data.val, recipe.data.options)
        teacher, student = load_run(str(folder), "teacher", "cpu"), load_run(str(folder), "student", "cpu")
    except UserError as error:
        return [Section("features", "What the patches mean", note(f"Nothing can be drawn: {error}."))]
    most = recipe.data.max_pixels
    read = squares(source, spread(len(source), COLOURED), recipe.largest_view, most)
    if read.pixels is None:
        return [Section("features", "What the patches mean", note(f"No image of {source.uri} can be read."))]
    portraits = squares(source, read.indices, pictures.fine_size(teacher), most).pixels
    assert portraits is not None
    pixels = teacher.normalise(portraits)
    seen = [attention.attention(encoder.towers.image, pixels) for encoder in (student, teacher)]
    sections = [
        pictures.colour_section(list(portraits), *pictures.patch_colours([student, teacher], pixels)),
        attention.attention_section(list(portraits), *seen),
    ]
    if any(isinstance(config, Filip.Config) for config in recipe.objectives.values()):
        captions = [source[index].captions for index in read.indices]
        trained = any(isinstance(config, Clip.Config) for config in recipe.objectives.values())
        measured = {"student": student, "teacher": teacher}[recipe.evaluation.model]
        sections += alignment.alignment_section(measured, recipe.evaluation.model, portraits, captions, trained)
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
