"""The `harmony` command: each sub-command is a few lines over the package, and imports what is heavy only when it runs.

Exit status: 0 done, 2 the input was wrong (one sentence says what to change), 130 or 143 stopped by a signal after
saving, 1 anything else.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from harmony.disk import cannot_be_used, is_full, no_room
from harmony.errors import UserError

if TYPE_CHECKING:
    from harmony.recipe import Recipe

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises when a command, an option or an argument is wrong; older versions take it from click."""

app = typer.Typer(
    name="harmony",
    help="Pre-train image and text encoders on image-caption pairs, and measure what they learned.",
    epilog="A first run, minutes on a CPU: [bold]harmony train quickstart --out runs/quickstart[/]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Look at data, index it, or generate some.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(data, name="data", rich_help_panel="Look before you train")

_TRAINING, _LOOKING, _MEASURING = "Train", "Look before you train", "Measure and use"

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A name that `harmony recipes` lists, or a YAML file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Changes to the recipe by dotted key, such as train.epochs=10 or objectives.mae=null.",
        show_default=False,
    ),
]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run.", show_default=False)]
Uri = Annotated[
    str,
    typer.Argument(
        metavar="URI",
        help="Data by kind and place: shards:, table:, folder:, npz:, torchvision:, coco:, flickr:, masks:, scenes:.",
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"harmony {version('harmony')}\n")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command; the help text is the application's own."""


@app.command(rich_help_panel=_TRAINING)
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the run.", show_default=False)],
) -> None:
    """Train a recipe from the start, evaluate it, and write a report.

    Several processes: [bold]torchrun --nproc-per-node 8 -m harmony train ...[/]
    """
    from harmony.recipe import load

    loaded = load(recipe, overrides or [])
    from harmony.data.sources import open_source
    from harmony.training import trainer

    if loaded.data.val is not None:
        open_source(loaded.data.val, loaded.data.options)  # what is wrong with it is told now, not after training
    trainer.train(loaded, out)
    _finish(out, loaded)


@app.command(rich_help_panel=_TRAINING)
def resume(
    run: Run,
    force: Annotated[
        bool, typer.Option("--force", help="Go on even if recipe, data or software differ from the checkpoint's.")
    ] = False,
) -> None:
    """Go on with a run exactly where it stopped."""
    from harmony.training import trainer
    from harmony.training.run_directory import open_run

    trainer.resume(run, force)
    _finish(run, open_run(run).recipe())


def _finish(out: Path, recipe: "Recipe") -> None:
    """After training: measure on the validation data, write the report, say where everything is."""
    from harmony.evaluation.report import write_report
    from harmony.evaluation.tasks import evaluate_run

    if not _is_main():
        return
    for task, metrics in evaluate_run(out, recipe).items():
        _show_metrics(task, metrics)
    report = write_report(out)
    Console(highlight=False).print(f"Done. The report: [bold]{report}[/]")


@app.command(rich_help_panel=_MEASURING)
def evaluate(
    where: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Directory of a run or of a checkpoint, timm:NAME or open_clip:ARCH/TAG.",
            show_default=False,
        ),
    ],
    *,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="zero_shot, retrieval, knn, linear, fine_tune, segmentation or detection.",
            show_default=False,
        ),
    ],
    data_uri: Annotated[str, typer.Option("--data", metavar="URI", help="Data to measure on.", show_default=False)],
    train_uri: Annotated[
        str | None,
        typer.Option(
            "--train-data", metavar="URI", help="Labelled data to learn from, for knn, linear, ...", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Of a run: teacher, student or untrained (as first drawn); if left out, what its recipe names, the "
            "teacher where there is one.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the task; may be given again."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for metrics.json.", show_default=False)],
) -> None:
    """Measure a model on one task: a run's, a timm or open_clip model, or a file of weights."""
    from harmony import recipe_files
    from harmony.evaluation import tasks

    values = recipe_files.with_overrides({}, settings or [])
    chosen = dict(recipe_files.flat(values))
    outcome = tasks.run(where, task, data_uri, train_uri, model=model, settings=chosen, out=out)
    if not _is_main():
        return
    _show_card(outcome.details["card"])
    _show_metrics(task, outcome.metrics)
    Console(highlight=False).print(f"Written to [bold]{out / 'metrics.json'}[/]")


@app.command(rich_help_panel=_MEASURING)
def compare(
    rows: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE...]",
            help='Recipes, each a name, a file, or within quotes with changes of its own ("harmony objectives.mae=null '
            'name=no-mae"); and changes to all of them.',
            show_default=False,
        ),
    ],
    *,
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="One run of every row for each.")] = "0,1,2",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="What is measured; knn, linear, zero_shot and retrieval if left out, where data and model allow.",
            show_default=False,
        ),
    ] = None,
    data_uri: Annotated[
        str | None,
        typer.Option("--data", metavar="URI", help="Data to measure on, if not data.val.", show_default=False),
    ] = None,
    train_uri: Annotated[
        str | None,
        typer.Option(
            "--train-data",
            metavar="URI",
            help="Labelled data to learn from, for knn, linear, ..., if not the training data.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory, or one to go on in.", show_default=False)],
) -> None:
    """Train recipes on the same data, model, batch and length, and measure them by the same tasks."""
    from harmony import comparison

    numbers = comparison.seeds_of(seeds)
    named = None if tasks is None else [task.strip() for task in tasks.split(",")]
    page = comparison.compare(rows, out, numbers, named, data_uri, train_uri)
    if not _is_main():
        return
    sys.stdout.write((out / "compare.md").read_text(encoding="utf-8"))
    Console(highlight=False, stderr=True).print(f"Done. The comparison: [bold]{page}[/]")


@app.command(rich_help_panel=_MEASURING)
def export(
    where: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Directory of a run or of a checkpoint.", show_default=False),
    ],
    *,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="timm, open_clip, huggingface or onnx.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the model.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="teacher, student or untrained; if left out, what is measured.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a trained model in the form of another library."""
    from harmony.interchange import export as exports
    from harmony.training.trained import read_trained

    exports.check(to, out)
    trained = read_trained(where, model)
    what = exports.Exported(trained.name, trained.towers, trained.recipe.model, trained.contrast())
    Console(highlight=False).print(f"Written to [bold]{exports.export(what, to, out)}[/]")


@app.command(rich_help_panel=_MEASURING)
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a run or of results.", show_default=False)
    ],
) -> None:
    """Write DIR/report.html: results of every task, curves, and what the encoder makes of images."""
    from harmony.evaluation.report import write_report

    Console(highlight=False).print(f"The report: [bold]{write_report(directory)}[/]")


@app.command(rich_help_panel=_LOOKING)
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="One to be shown in full.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the recipes, or show one with every setting explained."""
    if name is None:
        _list_recipes()
        return
    from harmony.recipe import resolve
    from harmony.recipe_text import explained

    console = Console()
    text = explained(resolve(name, overrides or []), min(120, console.width) if console.is_terminal else 120)
    if not console.is_terminal:
        sys.stdout.write(text)
        return
    from rich.syntax import Syntax

    console.print(Syntax(text, "yaml", theme="ansi_dark", background_color="default", word_wrap=True))


@app.command(rich_help_panel=_LOOKING)
def cost(
    recipe: RecipeName,
    overrides: Overrides = None,
    caption_tokens: Annotated[
        int, typer.Option(min=3, metavar="N", help="Length that captions are taken to have.")
    ] = 24,
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that the batch is spread over.")] = 1,
) -> None:
    """Count parameters, tokens, FLOPs and memory of a recipe before anything is trained."""
    from harmony.recipe import resolve

    resolved = resolve(recipe, overrides or [])
    from harmony.training.cost import cost_of
    from harmony.training.cost_tables import tables

    with Console(stderr=True).status("rehearsing a step ..."):
        counted = cost_of(resolved, caption_tokens, processes)
    Console(highlight=False).print(tables(counted))


@data.command("inspect")
def data_inspect(
    uri: Uri,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a sheet of images into this PNG file.", show_default=False)
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Read every example, not just a thousand spread evenly.")
    ] = False,
) -> None:
    """Show counts, sizes, caption lengths and what is bad, and draw a sheet of images when asked to."""
    from harmony.data import inspect

    found = inspect.show(uri, sheet, most=None if every else inspect.LOOKED_AT)
    if not found.widths:
        raise UserError(f"none of the {found.looked_at:,} images looked at can be used; mend {uri} or name other data")


@data.command("index")
def data_index(uri: Uri) -> None:
    """Read through shards once, so that training on them begins at once."""
    from harmony.data import inspect

    inspect.show_index(uri)


@data.command("generate")
def data_generate(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Scenes, as scenes:train?count=1000&size=128.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for the shards.", show_default=False)],
) -> None:
    """Write generated scenes as WebDataset shards, a pattern for one's own data."""
    from harmony.data.scenes.generate import generate

    shards = generate(uri, out)
    Console(highlight=False).print(f"Written: [bold]{shards[0]}[/]" + (f" .. {shards[-1].name}" if shards[1:] else ""))


def _list_recipes() -> None:
    from harmony.recipe_list import listing

    console = Console(highlight=False)
    console.width = min(100, console.width) if console.is_terminal else 100
    console.print(listing(console.width))


def _show_card(rows: Mapping[str, str]) -> None:
    from rich.table import Table

    table = Table(title="protocol", title_justify="left", title_style="bold cyan", box=None, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")  # a URI is one long word, of which nothing may be missing
    for name, says in rows.items():
        table.add_row(name, says)
    Console(highlight=False).print(table)


def _show_metrics(task: str, metrics: Mapping[str, float]) -> None:
    from rich.table import Table

    from harmony.evaluation.report.words import metric

    table = Table(title=task, title_justify="left", title_style="bold cyan", box=None, show_header=False)
    for name, value in metrics.items():
        chance = metrics.get(f"chance_{name}")
        if chance is not None:
            table.add_row(metric(name), f"{value:.1%}", f"[dim]chance {chance:.1%}[/]")
        elif not name.startswith("chance_"):
            table.add_row(metric(name), f"{value:g}")
    table.columns[1].justify = "right"
    Console(highlight=False).print(table)


def _is_main() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="harmony", standalone_mode=False)
    except UserError as error:
        return _told(str(error), 2)
    except _UsageError as error:
        return _told(_about_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as stop:  # a signal stopped the run, which has said so and saved
        return int(stop.code or 0)
    except Exception as error:
        if is_full(error):
            return _told(str(no_room(getattr(error, "filename", None))), 2)
        if refusal := cannot_be_used(error):
            return _told(refusal, 2)
        message = _about_failure(error)
        if message is None:
            raise
        return _told(message, 1)
    return status if isinstance(status, int) else 0


def _told(message: str, status: int) -> int:
    if message and _is_main():
        sys.stderr.write(f"harmony: {message}\n")
    return status


def _about_usage(error: Any) -> str:
    """What is wrong with the command line, in one sentence; nothing when the help was shown instead."""
    message: str = error.format_message().rstrip(".")
    if not message:
        return ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "harmony"
    told = (message[0].lower() + message[1:]).replace(". Did you mean", "; did you mean")
    return told if told.endswith("?") else f"{told}; `{command} --help` says how"


def _about_failure(error: Exception) -> str | None:
    """What to say of a failure that needs no traceback; None for all others."""
    from torch import OutOfMemoryError

    from harmony.training.distributed import TrainingError

    if isinstance(error, OutOfMemoryError):
        return (
            "the GPU ran out of memory; lower data.batch_size, raise train.accumulate, or set "
            "efficiency.checkpointing=blocks (`harmony cost` estimates what is needed)"
        )
    return str(error) if isinstance(error, TrainingError) else None


if __name__ == "__main__":
    sys.exit(main())
