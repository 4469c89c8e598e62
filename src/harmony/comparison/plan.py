"""What is to be done, as data: every run, the steps at which it is measured, and what is measured of it.

All that can be wrong is found here, before anything is written: each row's trainer is built once, and thrown away.
"""

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harmony import recipe as recipes
from harmony import recipe_files
from harmony.comparison import rows as words
from harmony.comparison.terms import Row, on_equal_terms
from harmony.data.sources import Source, open_source
from harmony.errors import UserError
from harmony.evaluation.encoders import TowersEncoder
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.task import Setup
from harmony.evaluation.tasks import task_named
from harmony.interchange.start import file_of
from harmony.recipe import Recipe
from harmony.training.distributed import Place
from harmony.training.trainer import Trainer

USUAL = ("knn", "linear", "zero_shot", "retrieval")
"""Tasks of a comparison that names none, as far as data and towers can answer them."""

CHEAP = ("knn", "zero_shot", "retrieval")
"""Tasks that train nothing, which are measured at every checkpoint for the curves."""


@dataclass(frozen=True)
class Entry:
    """A row of the comparison, ready to run.

    Attributes:
        row: what is trained.
        copy: the copy of the towers that is measured, teacher or student.
        missing: by task, why it cannot be done with this row; tasks that can are not in it.
    """

    row: Row
    copy: str
    missing: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.row.name


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        command: what was typed.
        entries: the rows.
        seeds: of each row's runs.
        tasks: what is measured at the end of a run.
        along: what is measured at every checkpoint besides.
        data: what is measured on.
        train: labelled data that knn, linear, ... learn from.
        pairs: the training data: URI, number of examples and fingerprint.
        steps: of a run.
        points: steps after which a run is measured, the last one among them.
    """

    command: str
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    along: tuple[str, ...]
    data: Source
    train: Source
    pairs: Mapping[str, Any]
    steps: int
    points: tuple[int, ...]

    @property
    def first(self) -> Recipe:
        """The recipe that all terms are taken from."""
        return self.entries[0].row.recipe

    @property
    def config(self) -> EvaluationConfig:
        return self.first.evaluation

    @property
    def batch_size(self) -> int:
        return self.first.data.batch_size

    @property
    def twin(self) -> Entry:
        """Whose untrained model is measured: the first row's that can do most tasks."""
        return min(self.entries, key=lambda entry: len(entry.missing))

    def setup(self, encoder: TowersEncoder, config: EvaluationConfig | None = None) -> Setup:
        """What a task is given to measure an encoder."""
        most = self.first.data.max_pixels
        return Setup(encoder, self.data, self.train, config or self.config, max_pixels=most)

    def terms(self) -> Iterator[tuple[str, Any]]:
        """Whatever results depend on, each with a name: a comparison goes on only where all of it is the same."""
        yield "the rows", [entry.name for entry in self.entries]
        yield "--seeds", list(self.seeds)
        yield "--tasks", list(self.tasks)
        yield "the training data", self.pairs["fingerprint"]
        yield "the data measured on", self.data.fingerprint()
        yield "the data that tasks learn from", self.train.fingerprint()
        for entry in self.entries:
            recipe = entry.row.recipe
            yield f"the measured copy of {entry.name}", entry.copy
            for key, value in recipe_files.flat(recipes.results_of(recipe)):
                yield f"{key} of {entry.name}", value
            for key, source in given_weights(recipe).items():
                file = file_of(source, key)
                yield f"the weights of {key} of {entry.name}", _digest(file) if file else source
        yield "train.checkpoint_every", str(self.first.train.checkpoint_every)
        for key, value in recipe_files.flat(self.config.model_dump(mode="json")):
            if key not in ("tasks", "model", "train", "workers", "features"):
                yield f"evaluation.{key}", value


def given_weights(recipe: Recipe) -> dict[str, str]:
    """The sources of weights that a recipe begins with or looks at, by the setting that names them."""
    init = recipe.model.init
    given = {"model.init": init} if isinstance(init, str | None) else {
        "model.init.image": init.image, "model.init.text": init.text,
    }  # fmt: skip
    given |= {f"frozen.{name}.init": model.init for name, model in recipe.frozen.items()}
    return {key: source for key, source in given.items() if source is not None}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def plan_of(arguments: Sequence[str], seeds: Sequence[int], tasks: Sequence[str] | None, command: str) -> "Draft":
    """The plan as far as it can be made without data: recipes on equal terms.

    Raises:
        UserError: the command line cannot work.
    """
    if not seeds:
        raise UserError("--seeds names no seed; write --seeds 0,1,2")
    repeated = next((seed for seed in seeds if list(seeds).count(seed) > 1), None)
    if repeated is not None:
        raise UserError(f"--seeds names {repeated} twice; each seed is one run of every row")
    for task in tasks or ():
        task_named(task)
    twice = next((task for task in tasks or () if list(tasks or ()).count(task) > 1), None)
    if twice is not None:
        raise UserError(f"--tasks names {twice} twice; leave one out")
    asked, shared = words.read(arguments)
    rows = on_equal_terms(asked, shared)
    if rows[0].recipe.data.val is None:
        raise UserError("there are no data to measure on; name them, as in --data scenes:held_out (or data.val=URI)")
    return Draft(command, rows, tuple(seeds), tuple(tasks) if tasks else None)


@dataclass(frozen=True)
class Draft:
    """A plan whose data have not been opened. Attributes as of `Plan`."""

    command: str
    rows: Sequence[Row]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...] | None

    def checked(self, place: Place) -> Plan:
        """The plan, once data are open and every row's trainer has been built; all ranks have to call it.

        Raises:
            UserError: data and recipes do not fit together.
        """
        recipe = self.rows[0].recipe
        options = recipe.data.options
        assert recipe.data.val is not None
        data = open_source(recipe.data.val, options)
        train = open_source(recipe.evaluation.train or recipe.data.train, options)
        plan = Plan(self.command, (), self.seeds, self.tasks or USUAL, (), data, train, {}, 0, ())
        for row in self.rows:
            plan = _with_row(plan, row, place)
        tasks = _possible(plan, asked=self.tasks is not None)
        entries = [
            replace(one, missing={t: why for t, why in one.missing.items() if t in tasks}) for one in plan.entries
        ]
        for entry in entries:
            if set(entry.missing) >= set(tasks):
                raise UserError(
                    f"the row {entry.name!r} can be measured by none of the tasks ({tasks[0]}: "
                    f"{entry.missing[tasks[0]]}); leave it out, or name a task in --tasks that it can do"
                )
        along = [task for task in tasks if task in CHEAP] or [task for task in tasks if task == "linear"]
        return replace(plan, entries=tuple(entries), tasks=tasks, along=tuple(along))


def _with_row(plan: Plan, row: Row, place: Place) -> Plan:
    """The plan with one more entry, and with what its trainer knows of the data."""
    try:
        trainer = Trainer(row.seeded(plan.seeds[0]), place)
    except UserError as error:
        raise UserError(f"the row {row.name!r}: {error}") from None
    copy = row.copy or ("teacher" if trainer.learner.plan.teacher else "student")
    entry = Entry(row, copy, {})
    grown = replace(plan, entries=(*plan.entries, entry), pairs=trainer.data, steps=trainer.clock.steps)
    setup = grown.setup(TowersEncoder(row.name, trainer.learner.teacher, row.recipe, place.device))
    missing = {task: reason for task in plan.tasks if (reason := task_named(task).missing(setup))}
    every = max(1, round(row.recipe.train.checkpoint_every.steps(trainer.clock)))
    points = sorted({*range(every, grown.steps, every), grown.steps})
    del trainer, setup
    gc.collect()  # a learner and its optimiser hold each other
    return replace(grown, entries=(*plan.entries, replace(entry, missing=missing)), points=tuple(points))


def _possible(plan: Plan, asked: bool) -> tuple[str, ...]:
    """The tasks that some row can do.

    Raises:
        UserError: a task that was asked for, or every one, can be done with no row.
    """
    possible = []
    for task in plan.tasks:
        reasons = [entry.missing.get(task) for entry in plan.entries]
        if None in reasons:
            possible.append(task)
        elif asked:
            raise UserError(f"no row can do {task}: {reasons[0]}")
    if not possible:
        reasons = [entry.missing[plan.tasks[0]] for entry in plan.entries]
        raise UserError(f"nothing can be measured on {plan.data.uri}: {reasons[0]}")
    return tuple(possible)
