"""The loop: `train` starts a run, `resume` goes on with one, a `Trainer` makes the steps.

A step: batch -> colours on the device -> for each group of objectives: encode, losses, backward -> one gradient
reduction over ranks -> clip -> optimiser -> centres and teacher. Host and device meet once a step, when the losses and
the norms of the gradient, a few numbers, are read to see whether they are finite.
"""

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harmony import ranks
from harmony import recipe as recipes
from harmony.data.batch import Batch
from harmony.data.captions import Tokenizer
from harmony.data.loader import PairLoader, epoch_steps
from harmony.data.photometric import augment
from harmony.data.sources import Source, open_source
from harmony.recipe import Recipe
from harmony.schedules import Clock, Duration
from harmony.training import checkpoints, distributed, resuming
from harmony.training.checkpoints import State
from harmony.training.diagnostics import Measured, Watch, complaint
from harmony.training.distributed import Place, together
from harmony.training.journal import Journal
from harmony.training.learner import build_learner
from harmony.training.logs import check_installed, cut_after
from harmony.training.optimiser import Gradients, adamw, learning_rate, set_rates
from harmony.training.run_directory import RunDirectory, check_free, locked, new_run, open_run
from harmony.training.signals import Interrupted, Signals

_COLLECT_EVERY = 100
"""Steps between Python's garbage collections, which would otherwise halt one rank or another at any time."""


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
            recipe, checkpoint = run.recipe(), run.latest()
            if checkpoint is None:  # it was stopped before its first one
                trainer = Trainer(recipe, place)
            else:
                state = resuming.check(run, checkpoint, recipe, force)
                trainer = Trainer(resuming.without_init(recipe), place)
                resuming.check_data(run, state, trainer.data, force)
                trainer.restore(checkpoint, state)
            if ranks.is_main():
                cut_after(run.log, trainer.clock.step)
                cut_after(run.bad_examples, trainer.clock.step)
        trainer.run(run)
    return run.path


class Trainer:
    """A recipe made ready to train on one rank.

    Attributes:
        recipe, place: what is trained, and where this process runs.
        data: what is known of the training data: its URI, number of examples and fingerprint.
        learner, optimiser, gradients, scaler: models and objectives, and what changes them; scaler is fp16's.
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
        self.recipe, self.place = recipe, place
        source = open_source(recipe.data.train, recipe.data.options)
        self.data = {"uri": recipe.data.train, "examples": len(source), "fingerprint": source.fingerprint()}
        torch.manual_seed(recipe.train.seed)
        self.learner = build_learner(recipe).to(place.device)
        ranks.broadcast(list(self.learner.state_dict().values()))
        self.optimiser = adamw(self.learner, recipe.optim)
        self.gradients = Gradients(self.learner.parts(), recipe.optim)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.train.precision]
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.dtype == torch.float16)
        self.watch = Watch(recipe.train.max_skipped_steps)
        epoch = epoch_steps(len(source), recipe.data.batch_size, source.uri)
        recipes.check_against_data(recipe, epoch)
        self.clock = Clock(step=0, steps=recipes.total_steps(recipe, epoch), epoch_steps=epoch)
        self.loader = self._loader(source)

    def _loader(self, source: Source) -> PairLoader:
        recipe, text, image = self.recipe, self.recipe.model.text, self.recipe.model.image
        return PairLoader(
            source,
            recipe.data,
            recipe.views,
            tokenizer=Tokenizer(text.context, text.truncation) if text else None,
            masks=self.learner.masks(),
            patch=self.learner.student.image.patch,
            mean=image.mean,
            std=image.std,
            seed=recipe.train.seed,
            steps=self.clock.steps,
            accumulate=recipe.train.accumulate,
            augment="device" if self._colours_on_device else "worker",
            rank=self.place.rank,
            ranks=self.place.ranks,
            device=self.place.device,
        )

    def run(self, run: RunDirectory) -> None:
        """Train until the end of the run or a signal, and save. Raises as `train` does."""
        log_every = self._steps(self.recipe.train.log_every)
        save_every = self._steps(self.recipe.train.checkpoint_every)
        with (
            checkpoints.full_disk_explained(run.path),
            Journal(run, self.recipe, self.clock, self.place.device) as journal,
            Signals() as signals,
            _garbage_by_hand(),
        ):
            batches = self.loader.batches(self.clock.step)
            while self.clock.step < self.clock.steps:
                with journal.waiting():
                    loaded = self.load(batches, signals)
                if not loaded:
                    break
                step = self.clock.step + 1
                logged = step == 1 or step % log_every == 0 or step == self.clock.steps
                measured = self.train_step(loaded, logged)
                self.clock = replace(self.clock, step=step)
                self.watch.look(step, measured, loaded, run.not_finite, journal.say)
                journal.step(self.clock, measured, loaded)
                if logged:
                    journal.log(self.clock, measured, self.learner.signs(), self.watch.skipped)
                if step % save_every == 0:
                    journal.note_bad_examples()
                    self.save(run)
                if step % _COLLECT_EVERY == 0:
                    gc.collect()
            journal.note_bad_examples()
            self.save(run)
            number = signals.anywhere()
        if number is not None:
            raise Interrupted(number, self.clock.step, run.path)

    def load(self, batches: Iterator[Batch], signals: Signals) -> list[Batch]:
        """The micro-batches of the next step, on the host; none when a signal stops the run on any rank."""
        loaded: list[Batch] = []
        with together():
            try:
                loaded = [next(batches) for _ in range(self.recipe.train.accumulate)]
            except RuntimeError:
                if signals.received is None:  # else the signal may have reached a worker of the loader, too
                    raise
        return [] if signals.anywhere() is not None else loaded

    def train_step(self, loaded: Sequence[Batch], logged: bool = False) -> Measured:
        """One step: gradients of all losses over all micro-batches, then the update, unless something is not finite.

        Args:
            loaded: the step's micro-batches on this rank, as the loader gives them.
            logged: whether signs will be read.
        """
        optim, clock = self.recipe.optim, self.clock
        _seed_generators(self.recipe.train.seed, clock.step)
        rates = {
            "lr": learning_rate(optim, clock, self.recipe.data.batch_size),
            "weight_decay": optim.weight_decay(clock),
            "teacher_momentum": self.recipe.teacher.momentum(clock),
        }
        set_rates(self.optimiser, rates["lr"], rates["weight_decay"])
        losses, weights = self.backward(loaded, logged)
        ranks.average_gradients(self.gradients.parameters)
        self.scaler.unscale_(self.optimiser)
        self.learner.before_update(clock)
        norms = self.gradients.norms()
        measured = self._measured(losses, weights, norms, rates)
        if measured.updates:
            self.gradients.clip(norms)
            self.scaler.step(self.optimiser)
            self.learner.after_update(clock, rates["teacher_momentum"])
        else:
            self.learner.after_skip()
        self.scaler.update()
        self.optimiser.zero_grad()
        return measured

    def backward(self, loaded: Sequence[Batch], logged: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Add up the gradients of the micro-batches' mean loss.

        Each group of objectives runs backward before the next one is encoded. Signs are those of the last micro-batch.

        Returns:
            Each loss, unweighted, averaged over the micro-batches; and the weights.
        """
        losses: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for number, batch in enumerate(loaded, start=1):
            groups = self.learner.losses_by_group(self._on_device(batch), self.clock, logged and number == len(loaded))
            while True:
                with torch.autocast(self.place.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    group = next(groups, None)
                if group is None:
                    break
                self.scaler.scale(group.total() / len(loaded)).backward()
                for name, loss in group.losses.items():
                    losses[name] = losses.get(name, 0) + loss.detach() / len(loaded)
                weights |= group.weights
        return losses, weights

    def save(self, run: RunDirectory) -> None:
        """Write a checkpoint of this step, unless there is one. Ranks wait for the first."""
        with together():
            if ranks.is_main():
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
                training = {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}
                model, keep = self.learner.state_dict(), self.recipe.train.keep
                checkpoints.save(run.checkpoints, model, training, state, self.recipe.to_yaml(), keep)

    def restore(self, checkpoint: Path, state: State) -> None:
        """Take everything back from a checkpoint.

        Raises:
            UserError: it cannot be read, or is of another model.
        """
        resuming.load_model(self.learner, checkpoint)
        training = checkpoints.read_training(checkpoint)
        resuming.load_optimiser(self.optimiser, training["optimiser"], checkpoint)
        if self.scaler.is_enabled() and training["scaler"]:
            self.scaler.load_state_dict(training["scaler"])
        self.clock = replace(self.clock, step=state.step)
        self.watch.skipped = state.skipped

    @property
    def _colours_on_device(self) -> bool:
        """Whether crops are changed and normalised on the device; by itself only a GPU does it."""
        where = self.recipe.efficiency.augment
        return where == "device" or (where == "auto" and self.place.device.type != "cpu")

    def _on_device(self, batch: Batch) -> Batch:
        batch = batch.to(self.place.device)
        if not self._colours_on_device:
            return batch
        image = self.recipe.model.image
        return augment(batch, self.recipe.views, image.mean, image.std)

    def _steps(self, duration: Duration) -> int:
        return max(1, round(duration.steps(self.clock)))

    def _measured(
        self, losses: dict[str, Tensor], weights: dict[str, float], norms: Tensor, rates: dict[str, float]
    ) -> Measured:
        """The step's numbers on the host, in one transfer, and whether the update can be made."""
        local = torch.stack(list(losses.values()))
        parts = self.gradients.by_part(norms)
        numbers = torch.cat([local, ranks.mean(local), parts]).tolist()
        own, joined, by_part = numbers[: len(losses)], numbers[len(losses) : -len(parts)], numbers[-len(parts) :]
        if self.scaler.is_enabled():
            rates = {**rates, "loss_scale": self.scaler.get_scale()}
        return Measured(
            losses=dict(zip(losses, joined, strict=True)),
            weights=weights,
            norms=dict(zip(self.gradients.parts, by_part, strict=True)),
            rates=rates,
            sick=...
        )


def _seed_generators(seed: int, step: int) -> None:
    """Seed Python's and torch's generators for a step.

    Nothing in harmony draws from them while training; an objective from elsewhere that does draws the same after a resume.
    """
    number = (seed * 1_000_003 + step) * ranks.count() + ranks.rank()
    random.seed(number)
    torch.manual_seed(number % 2**63)


@contextmanager
def _garbage_by_hand() -> Iterator[None]:
    """Python's garbage collector set aside, for the loop to call."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
