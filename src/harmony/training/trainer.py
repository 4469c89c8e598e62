"""The loop: `train` starts a run, `resume` goes on with one. What a step does is in harmony.training.step."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harmony import ranks
from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.data.captions import Tokenizer
from harmony.data.loader import PairLoader, epoch_steps
from harmony.data.sources import Source, open_source
from harmony.recipe import Recipe
from harmony.schedules import Clock, Duration
from harmony.training import checkpoints, distributed, resuming
from harmony.training.checkpoints import State
from harmony.training.diagnostics import Watch
from harmony.training.distributed import Place, together
from harmony.training.journal import Journal
from harmony.training.learner import build_learner
from harmony.training.logs import check_installed, cut_after
from harmony.training.measured import Measured, Numbers
from harmony.training.process import GarbageByHand, give_back_large_blocks, repeatable
from harmony.training.run_directory import RunDirectory, check_free, locked, new_run, open_run
from harmony.training.signals import Interrupted, Signals
from harmony.training.step import Stepper


def train(recipe: Recipe, out: Path | str) -> Path:
    """Train a recipe from the start into the new directory `out`; under torchrun, together with the other processes.

    Everything that can be wrong with the input is found before `out` is made.

    Returns:
        `out`, holding the log and the last checkpoints.

    Raises:
        UserError: the input cannot work, or there is no room on the disk.
        TrainingError: losses or gradients are not finite.
        Interrupted: a signal stopped the run, after saving.
    """
    run = RunDirectory(Path(out))
    with distributed.session() as place, ExitStack() as stack:
        with together():
            check_free(run.path)
            trainer = Trainer(recipe, place)
            checkpoints.check_room(run.path, trainer.learner.state_dict(), trainer.stepper.gradients.bytes)
        with together():
            if ranks.is_main():
                stack.enter_context(new_run(run.path, recipe))
        trainer.run(run)
    return run.path


def resume(out: Path | str, force: bool = False) -> Path:
    """Go on with the run in `out` from its newest checkpoint, exactly as if it had never stopped.

    Args:
        out: the directory of the run.
        force: go on although recipe, data or software differ from those of the checkpoint in a way that matters.

    Returns, raises: as `train`.
    """
    with distributed.session() as place, ExitStack() as stack:
        with together():
            run = open_run(out)
            if ranks.is_main():
                stack.enter_context(locked(run))
        with together():
            note, recipe, checkpoint = "", run.recipe(), run.latest()
            if checkpoint is None:
                note = "No checkpoint was saved before this run stopped, so it begins again"
                trainer = Trainer(recipe, place)
            else:
                state = resuming.check(run, checkpoint, recipe, force)
                trainer = Trainer(resuming.without_init(recipe), place)
                resuming.check_data(run, state, trainer.data, force)
                trainer.restore(checkpoint, state)
            if ranks.is_main():
                cut_after(run.log, trainer.clock.step)
                cut_after(run.bad_examples, trainer.clock.step)
        trainer.run(run, note)
    return run.path


@dataclass(frozen=True)
class Unread:
    """A step whose numbers nobody has looked at yet: the place after it, these, and its examples."""

    clock: Clock
    numbers: Numbers
    loaded: Sequence[Batch]


class Trainer:
    """A recipe made ready to train on one rank.

    Attributes:
        recipe, place: what is trained, and where this process runs.
        data: what is known of the training data: its URI, number of examples and fingerprint.
        learner: models and objectives.
        stepper: what updates them.
        loader: the batches.
        clock: the place in the run.
        watch: steps that were not finite.
    """

    def __init__(self, recipe: Recipe, place: Place) -> None:
        """Build everything; nothing is written.

        Raises:
            UserError: something in the recipe or the data cannot work.
        """
        check_installed(recipe.train.loggers)
        give_back_large_blocks()
        self.recipe, self.place = recipe, place
        source = open_source(recipe.data.train, recipe.data.options)
        self.data = {"uri": recipe.data.train, "examples": len(source), "fingerprint": source.fingerprint()}
        epoch = epoch_steps(len(source), recipe.data.batch_size, source.uri)
        recipes.check_against_data(recipe, epoch)
        self.clock = Clock(step=0, steps=recipes.total_steps(recipe, epoch), epoch_steps=epoch)
        torch.manual_seed(recipe.train.seed)
        self.learner = build_learner(recipe).to(place.device)
        self.learner.check_part(recipe.data.batch_size // recipe.train.accumulate)
        ranks.broadcast(list(self.learner.state_dict().values()))
        self.stepper = Stepper(self.learner, recipe, place.device)
        self.loader = self._loader(source)
        self.watch = Watch(recipe.train.max_skipped_steps)
        self._unread: Unread | None = None

    def _loader(self, source: Source) -> PairLoader:
        recipe, text, image = self.recipe, self.recipe.model.text, self.recipe.model.image
        used = self.learner.views()
        return PairLoader(
            source,
            recipe.data,
            {name: view for name, view in recipe.views.items() if name in used},
            tokenizer=Tokenizer(text.context, text.truncation) if text else None,
            masks=self.learner.masks(),
            patch=self.learner.student.image.patch,
            mean=image.mean,
            std=image.std,
            seed=recipe.train.seed,
            steps=self.clock.steps,
            accumulate=recipe.train.accumulate,
            augment="device" if self.stepper.augments else "worker",
            rank=self.place.rank,
            ranks=self.place.ranks,
            device=self.place.device,
            labels=self.learner.needs_labels(),
        )

    def run(self, run: RunDirectory, note: str = "") -> None:
        """Train until the end of the run or a signal, and save, after telling `note`. Raises what `train` raises."""
        log_every = self._steps(self.recipe.train.log_every)
        save_every = self._steps(self.recipe.train.checkpoint_every)
        with (
            checkpoints.full_disk_explained(run.checkpoints),
            Signals() as signals,
            Journal(run, self.recipe, self.clock, self.place.device) as journal,
            closing(self.loader.batches(self.clock.step)) as batches,  # ends the workers, whatever happens
            repeatable(self.recipe.efficiency.deterministic),
            GarbageByHand() as garbage,
        ):
            if self.clock.step < self.clock.steps:
                journal.say(self._headline(run))
            if note:
                journal.say(note)
            for problem in self.loader.source.problems():
                journal.say(f"In the data: {problem}")
            while self.clock.step < self.clock.steps:
                with journal.waiting(), journal.keeping_bad_examples(self.loader, self.clock.step + 1):
                    loaded = self._load(batches, signals)
                if not loaded:
                    break
                step = self.clock.step + 1
                logged = step == 1 or step % log_every == 0 or step == self.clock.steps
                numbers = self.stepper.step(loaded, self.clock, logged)
                self.clock = replace(self.clock, step=step)
                journal.note(step, loaded)
                self._look_back(run, journal)
                self._unread = Unread(self.clock, numbers, loaded)
                if logged:
                    measured = self._look_back(run, journal)
                    assert measured is not None
                    journal.log(self.clock, measured, self.learner.signs(), self.watch.skipped)
                if step % save_every == 0:
                    self._save(run, journal)
                garbage.step(step)
            self._save(run, journal)
            stopped_by = signals.anywhere()
        if stopped_by is not None:
            journal.say(f"Stopped and saved at step {self.clock.step}; go on with `harmony resume {run.path}`")
            raise Interrupted(stopped_by)

    def _look_back(self, run: RunDirectory, journal: Journal) -> Measured | None:
        """Read what the last step found, unless that is done, and tell of it. All ranks must call this.

        In the loop the next step is under way by then, so that the device never waits for the host to have looked.
        """
        if self._unread is None:
            return None
        clock, measured, loaded = self._unread.clock, self._unread.numbers.read(), self._unread.loaded
        self._unread = None
        if measured.complaint:
            journal.say(self.watch.skip(run.not_finite, clock.step, measured.complaint, measured.sick, loaded))
        else:
            self.watch.fine()
        journal.step(clock, measured)
        return measured

    def _headline(self, run: RunDirectory) -> str:
        """What is about to be done, in a line."""
        recipe, clock = self.recipe, self.clock
        trained = sum(parameter.numel() for parameter in self.stepper.gradients.parameters)
        ranks_too = f" x {self.place.ranks}" if self.place.ranks > 1 else ""
        return (
            f"{recipe.name}: {trained / 1e6:.1f} M parameters, {self.data['examples']} examples, "
            f"steps {clock.step + 1} to {clock.steps} of {recipe.data.batch_size} examples, "
            f"{recipe.train.precision} on {self.place.device.type}{ranks_too}, in {run.path}"
        )

    def _load(self, batches: Iterator[Batch], signals: Signals) -> list[Batch]:
        """The micro-batches of the next step, on the host; none when a signal stops the run on any rank."""
        loaded: list[Batch] = []
        with together():
            try:
                loaded = [next(batches) for _ in range(self.recipe.train.accumulate)]
            except RuntimeError:
                if signals.received is None:  # else the signal may have reached the loader's workers, too
                    raise
        return [] if signals.anywhere() is not None else loaded

    def _steps(self, duration: Duration) -> int:
        return max(1, round(duration.steps(self.clock)))

    def _save(self, run: RunDirectory, journal: Journal) -> None:
        """Write a checkpoint of this step, unless there is one. Ranks wait for the first."""
        self._look_back(run, journal)
        journal.note_bad_examples()
        with together():
            if not ranks.is_main():
                return
            state = State(
                step=self.clock.step,
                steps=self.clock.steps,
                epoch_steps=self.clock.epoch_steps,
                examples=self.clock.step * self.recipe.data.batch_size,
                skipped=self.watch.skipped,
                data=self.data,
                ranks=self.place.ranks,
                recipe=self.recipe.fingerprint(),
            )
            training = {
                "optimiser": self.stepper.optimiser.state_dict(),
                "scaler": self.stepper.scaler.state_dict(),
            }
            checkpoints.save(
                run.checkpoints,
                self.learner.state_dict(),
                training,
                state,
                recipe=self.recipe.to_yaml(),
                keep=self.recipe.train.keep,
            )

    def restore(self, checkpoint: Path, state: State) -> None:
        """Take everything back from a checkpoint.

        Raises:
            UserError: it cannot be read, or it is of another model.
        """
        training = checkpoints.read_training(checkpoint)
        resuming.load_model(self.learner, checkpoints.read_model(checkpoint), checkpoint)
        resuming.load_optimiser(self.stepper.optimiser, training["optimiser"], checkpoint)
        if self.stepper.scaler.is_enabled() and training["scaler"]:
            self.stepper.scaler.load_state_dict(training["scaler"])
        self.clock = replace(self.clock, step=state.step)
        self.watch.skipped = state.skipped
