"""Doing it: every row is trained with every seed, and measured; what is done already is not done again."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

from harmony import ranks
from harmony.comparison.plan import Entry, Plan
from harmony.comparison.rows import UNTRAINED
from harmony.comparison.store import Folder, Measured, installed
from harmony.errors import UserError
from harmony.evaluation.encoders import TowersEncoder, load_run
from harmony.evaluation.progress import say
from harmony.evaluation.results import Metrics
from harmony.evaluation.tasks import measure
from harmony.training import checkpoints, trainer
from harmony.training.distributed import Place, StoppedElsewhere, TrainingError, everyones, together
from harmony.training.run_directory import RunDirectory
from harmony.training.trained import drawn_towers


class Runs:
    """The runs of a plan, in a folder that is open. All ranks do the same."""

    def __init__(self, plan: Plan, folder: Folder, place: Place) -> None:
        self.plan, self.folder, self.place = plan, folder, place
        self._count = (1 + len(plan.entries)) * len(plan.seeds)
        self._begun = 0

    def untrained(self) -> None:
        """Measure the model before training, which also shows whether the data can be measured on at all."""
        twin = self.plan.twin
        for seed in self.plan.seeds:
            run = self.folder.run(UNTRAINED, seed)
            measured = self.folder.read(run)
            self._tell(UNTRAINED, seed, "measured already" if measured.curve else "measuring")
            if not measured.curve:
                towers = drawn_towers(twin.row.seeded(seed))
                encoder = TowersEncoder(UNTRAINED, towers, twin.row.recipe, self.place.device)
                measured.curve[0] = self._measured(encoder, _able(twin, self.plan.tasks), run)
                measured.software = installed()
                self.folder.write(run, measured)

    def trained(self) -> None:
        """Train and measure; a row whose losses are not finite is noted as failed, and the others go on.

        Raises:
            UserError: a run cannot be gone on with, or the disk is full.
            Interrupted: a signal stopped it, after saving.
        """
        for seed in self.plan.seeds:
            for entry in self.plan.entries:
                self._run(entry, seed)

    def _run(self, entry: Entry, seed: int) -> None:
        plan, run = self.plan, self.folder.run(entry.row.asked.folder, seed)
        measured = self.folder.read(run)
        done = measured.failed or set(_able(entry, plan.tasks)) <= set(measured.curve.get(plan.steps, {}))
        self._tell(entry.name, seed, "done already" if done else "training")
        if done:
            return
        measured.software = installed()
        measured.failed = self._train(entry, seed, run)
        gc.collect()  # the trainer's parts hold each other, on the GPU too
        if measured.failed:
            self._tell(entry.name, seed, f"failed: {measured.failed}", again=True)
        else:
            self._tell(entry.name, seed, "measuring", again=True)
            for step in plan.points:
                self._point(entry, run, step, measured)
        self.folder.write(run, measured)

    def _train(self, entry: Entry, seed: int, run: Path) -> str | None:
        """Train, go on training, or do nothing; gives why it failed, if its numbers were not finite."""
        error: BaseException | None = None
        with together():
            began = (run / "recipe.yaml").is_file()
            latest = RunDirectory(run).latest() if began else None
            step = checkpoints.read_state(latest).step if latest else 0
        began, step = everyones((began, step))[0]
        try:
            if not began:
                trainer.train(entry.row.seeded(seed), run)
            elif step < self.plan.steps:
                with together():
                    if ranks.is_main():  # what changes no result may be other than when the run began
                        entry.row.seeded(seed).save(RunDirectory(run).recipe_file)
                trainer.resume(run)
        except (UserError, TrainingError, StoppedElsewhere) as raised:
            error = raised
        told = [str(each) for each in everyones(error if isinstance(error, TrainingError) else None) if each]
        if error is not None and not told:
            raise error
        return told[0] if told else None

    def _point(self, entry: Entry, run: Path, step: int, measured: Measured) -> None:
        """Measure one checkpoint, unless that was done before, and remove it if it is not the last."""
        last = step == self.plan.steps
        directory = RunDirectory(run).checkpoints
        checkpoint = directory / f"step-{step:08}"
        with together():
            if last and ranks.is_main():  # those that an interruption left are no points of a curve
                _remove(checkpoints.every(directory)[:-1])
        tasks = _able(entry, self.plan.tasks if last else self.plan.along)
        if tasks and step not in measured.curve:
            encoder = load_run(str(checkpoint), entry.copy, self.place.device)
            measured.curve[step] = self._measured(encoder, tasks, run if last else None)
            self.folder.write(run, measured)
        with together():
            if not last and ranks.is_main():
                _remove([checkpoint])

    def _measured(self, encoder: TowersEncoder, tasks: Sequence[str], out: Path | None) -> Metrics:
        """What tasks say of an encoder; features are made once for all of them, and removed afterwards."""
        config = self.plan.config
        if config.features == "auto":
            config = config.model_copy(update={"features": str(self.folder.features)})
        setup = self.plan.setup(encoder, config)
        found: Metrics = {}
        for task in tasks:
            setup.work = None if out is None else out / "evaluation" / task
            found[task] = measure(task, setup, out).metrics
        self.folder.forget_features()
        return found

    def _tell(self, name: str, seed: int, what: str, again: bool = False) -> None:
        self._begun += not again
        if ranks.is_main():
            say(f"[{self._begun}/{self._count}] {name}, seed {seed}: {what}")


def _able(entry: Entry, tasks: Sequence[str]) -> tuple[str, ...]:
    """Those of the tasks that a row can do."""
    return tuple(task for task in tasks if task not in entry.missing)


def _remove(directories: Sequence[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
