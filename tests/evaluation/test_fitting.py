# ruff: noqa: NPY002 - the generators that augmentations draw from
"""The training loop of tasks: what a step is, what an interruption leaves, and what ranks share."""

import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from processes import Processes
from torch import nn

from harmony.errors import UserError
from harmony.evaluation import fitting
from harmony.evaluation.fitting import Average, Batches, Group, fit, forget, learning_rate
from harmony.evaluation.seeds import seeded
from harmony.evaluation.settings import FitConfig
from harmony.schedules import Clock, Duration
from harmony.training import distributed
from harmony.training.distributed import TrainingError
from harmony.training.signals import Interrupted

CPU = torch.device("cpu")
CONFIG = FitConfig(steps=9, train_batch_size=4, lr=0.05)


class Noisy(Batches):
    """Batches of (positions, noise of each generator that augmentation might draw from)."""

    def make(self, positions):
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor(positions, dtype=torch.float32), torch.tensor(noise)


def small_model(dtype=torch.float32, dropout=0.3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(dropout), nn.Linear(5, 1)).to(dtype)


class SmallLoss:
    """Positions in, a fifth of them out; a signal, or a value that is not finite, at a step counted from 1."""

    def __init__(self, model, dtype=torch.float32, noisy=1.0, signal_at=None, number=signal.SIGINT):
        self.model, self.dtype, self.noisy = model, dtype, noisy
        self.signal_at, self.number = signal_at, number
        self.calls = 0

    def __call__(self, batch):
        positions, noise = batch
        self.calls += 1
        if self.calls == self.signal_at:
            signal.raise_signal(self.number)
        x = positions.to(self.dtype)[:, None] / 10 + torch.arange(3) + self.noisy * noise.to(self.dtype).mean()
        return (self.model(x).squeeze(1) - positions.to(self.dtype) / 5).square().mean()


def all_of(model):
    return [Group(list(model.parameters()))]


def trained(work=None, config=CONFIG, ema=True, **loss):
    """A training of the small model: its weights, those averaged, its curve."""
    model = small_model()
    average = Average(model, 0.8)
    curve = fit(
        model, SmallLoss(model, **loss), Noisy(10, config), all_of(model), "fitting", device=CPU, workers=0, work=work,
        about={"data": "ten numbers"}, after_step=average.update, also={"average": average.model} if ema else {},
    )  # fmt: skip
    return model.state_dict(), average.model.state_dict(), curve


def rates(**settings):
    config = FitConfig(**settings)
    return [learning_rate(config, Clock(step, config.steps, 7)) for step in range(config.steps)]


def test_the_learning_rate_rises_in_equal_parts_and_falls_along_a_cosine():
    found = rates(steps=20, lr=2.0, final_lr=0.5, warmup="20%")
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    fall = [0.5 + 1.5 * (1 + math.cos(math.pi * place / 17)) / 2 for place in range(1, 17)]
    assert found[4:] == pytest.approx(fall)
    assert 0.5 < found[-1] < 0.6


def test_every_step_learns_however_few_there_are():
    for steps in (1, 2, 3):
        assert min(rates(steps=steps, lr=1.0, warmup=0)) > 0
    assert rates(steps=1, lr=1.0) == [1.0]
    assert rates(steps=4, lr=1.0, warmup="8 steps") == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert rates(steps=3, lr=1.0, warmup="1.5 steps")[:2] == pytest.approx([1 / 1.5, 1.0])


def test_warm_up_may_be_said_in_epochs():
    assert rates(steps=21, lr=1.0, warmup="1 epoch")[:7] == pytest.approx([k / 7 for k in range(1, 8)])


def test_a_group_learns_by_its_factor_and_decays_only_if_it_is_told_to():
    """AdamW's first step moves each weight by the learning rate, whatever its gradient, plus the decay."""
    weights = [nn.Parameter(torch.tensor([2.0])) for _ in range(3)]
    groups = [Group([weights[0]], 1.0, False), Group([weights[1]], 0.25, False), Group([weights[2]], 0.5, True)]
    model = nn.ParameterList(weights)
    config = FitConfig(steps=1, train_batch_size=2, lr=0.1, weight_decay=0.3, clip_norm=None)
    fit(model, lambda batch: sum(w.sum() * 3 for w in weights), Noisy(2, config), groups, "-", device=CPU, workers=0)
    moved = [2.0 - weight.item() for weight in weights]
    assert moved == pytest.approx([0.1, 0.025, 0.05 + 0.05 * 0.3 * 2.0], rel=1e-5)


def test_batches_are_a_function_of_the_step_whoever_makes_them():
    batches = Noisy(10, CONFIG)
    made = [batches[step] for step in range(9)]
    for workers, start in ((0, 0), (2, 0), (2, 5)):
        again = list(Noisy(10, CONFIG).from_step(start, workers, CPU))
        for ours, theirs in zip(again, made[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len({tuple(noise.tolist()) for _, noise in made}) == 9
    others = [Noisy(10, CONFIG.model_copy(update={"seed": 2**61}))[step] for step in range(9)]
    assert not any(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(made, others, strict=True))


def test_an_epoch_shows_no_example_twice_and_epochs_differ():
    batches = Noisy(10, FitConfig(epochs=3, train_batch_size=3))
    assert (batches.steps, batches.epoch_steps) == (9, 3)
    epochs = [torch.cat([batches[3 * epoch + step][0] for step in range(3)]).tolist() for epoch in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_making_batches_leaves_the_generators_as_they_were():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(()).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    list(Noisy(10, CONFIG).from_step(0, 0, CPU))
    trained()
    torch.manual_seed(5)  # what the small model is drawn from
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected


def test_a_place_has_its_own_chance():
    def drawn(*place):
        with seeded(*place):
            return torch.rand(()).item(), np.random.rand(), random.random()

    assert drawn("batch", 0, 1) == drawn("batch", 0, 1)
    assert len({drawn("batch", 0, 1), drawn("batch", 1, 0), drawn("step", 0, 1), drawn("batch", 0, 11)}) == 4


class Pairs(Noisy):
    multiple = 2


def test_a_batch_larger_than_the_data_is_all_of_them_and_this_is_said(capsys):
    assert Noisy(10, FitConfig(train_batch_size=64)).batch_size == 10
    assert "train_batch_size 64 is more than there is to learn from; a batch has 10 examples" in capsys.readouterr().err
    assert Pairs(11, FitConfig(train_batch_size=64)).batch_size == 10


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="a batch of 5 cannot be divided among groups of 2; set train_batch_size"):
        Pairs(10, FitConfig(train_batch_size=5))
    with pytest.raises(UserError, match="training examples: 1, but a step needs at least 2"):
        Pairs(1, FitConfig())
    with pytest.raises(UserError, match="training examples: 0, but a step needs at least 1"):
        Noisy(0, FitConfig())


class Gone(Noisy):
    def make(self, positions):
        raise UserError("photo-3 of folder:x is truncated, although it could be read before; correct the data")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_finds_wrong_is_said_in_the_same_sentence(workers):
    with pytest.raises(UserError) as error:
        next(iter(Gone(10, CONFIG).from_step(0, workers, torch.device("cpu"))))
    assert str(error.value) == "photo-3 of folder:x is truncated, although it could be read before; correct the data"


def test_it_learns():
    _, _, curve = trained(config=FitConfig(steps=300, train_batch_size=5, lr=0.05), noisy=0.0)
    assert curve[-1][1] < 0.5 * curve[0][1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, capsys, number, status):
    """Weights, their average, what AdamW remembers (else the next steps differ), dropout, augmentation, curve."""
    whole = trained()
    with pytest.raises(Interrupted) as stopped:
        trained(tmp_path, signal_at=4, number=number)
    assert stopped.value.code == status
    assert "Stopped and saved at step 4 of 9; the same command goes on" in capsys.readouterr().err
    gone_on = trained(tmp_path)
    assert "Going on from step 4" in capsys.readouterr().err
    for ours, theirs in zip(gone_on[:2], whole[:2], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert gone_on[2] == whole[2]
    assert not torch.equal(whole[0]["0.weight"], whole[1]["0.weight"])


def test_a_finished_training_is_not_done_again(tmp_path):
    first = trained(tmp_path)
    loss = SmallLoss(small_model())
    model = small_model()
    average = Average(model, 0.8)
    curve = fit(
        model, loss, Noisy(10, CONFIG), all_of(model), "fitting", device=CPU, workers=0, work=tmp_path,
        about={"data": "ten numbers"}, also={"average": average.model},
    )  # fmt: skip
    assert loss.calls == 0
    assert curve == first[2]
    assert all(torch.equal(model.state_dict()[name], first[0][name]) for name in first[0])
    assert not model.training
    (tmp_path / f".fit.pt.{os.getpid()}").touch()
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
    forget(tmp_path), forget(tmp_path / "nowhere"), forget(None)


def test_a_checkpoint_of_other_settings_is_told_and_not_used(tmp_path, capsys):
    with pytest.raises(Interrupted):
        trained(tmp_path, signal_at=4)
    config = CONFIG.model_copy(update={"lr": 0.01, "weight_decay": 0.2})
    ours = trained(tmp_path, config)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "belongs to a training with other lr, weight_decay; the training begins anew" in said
    assert "Going on" not in said
    assert all(torch.equal(ours[0][name], value) for name, value in trained(config=config)[0].items())


def test_a_damaged_checkpoint_is_told_and_not_used(tmp_path, capsys):
    trained(tmp_path)
    whole = (tmp_path / "fit.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"nonsense"):
        (tmp_path / "fit.pt").write_bytes(content)
        found = trained(tmp_path)
        assert "fit.pt cannot be read; the training begins anew" in capsys.readouterr().err.replace("\n", " ")
        assert found[2] == trained()[2]


def test_what_is_not_finite_is_named_by_its_step():
    model = small_model()
    batches = Noisy(10, CONFIG)

    def loss(value, at):
        calls = iter(range(1, 100))
        return lambda batch: model(torch.ones(1, 3)).sum() * (value if next(calls) == at else 1.0)

    with pytest.raises(TrainingError, match=r"fitting: the loss is not finite at step 3; lower lr"):
        fit(model, loss(math.nan, 3), batches, all_of(model), "fitting", device=CPU, workers=0)

    model = small_model()

    def finite_with_a_bad_gradient(batch):
        return (model[0].weight * 0).sqrt().sum()

    with pytest.raises(TrainingError, match=r"the gradient is not finite at step 1"):
        fit(model, finite_with_a_bad_gradient, batches, all_of(model), "fitting", device=CPU, workers=0)


def test_losses_that_are_looked_at_late_still_name_the_first_bad_step():
    losses = fitting._Losses("fitting", 100)
    for step in range(1, 6):
        losses.add(step, torch.tensor(math.inf if step >= 3 else 1.0), torch.tensor(1.0))
    with pytest.raises(TrainingError, match="at step 3;"):
        losses.look()


def test_the_curve_is_the_mean_of_all_losses_in_at_most_200_points(tmp_path):
    model = nn.Linear(1, 1)
    calls = iter(range(1, 1000))
    config = FitConfig(steps=450, train_batch_size=2)
    curve = fit(
        model, lambda batch: model.weight.sum() * 0 + float(next(calls)), Noisy(2, config), all_of(model), "-",
        device=CPU, workers=0,
    )  # fmt: skip
    assert len(curve) == 150
    assert curve[0] == (3, 2.0)
    assert curve[-1] == (450, 449.0)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, signal_at=4)
    good = (tmp_path / "fit.pt").read_bytes()
    (tmp_path / f".fit.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no room on the disk at .*fit\.pt; free some and run again"):
        trained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fit.pt"]
    assert (tmp_path / "fit.pt").read_bytes() == good


def test_a_disk_without_room_is_told_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    loss = SmallLoss(small_model())
    work = tmp_path / "out"
    with pytest.raises(UserError, match=r"takes 1\.0 MiB, and the disk of .* has 0\.0 MiB free"):
        fit(loss.model, loss, Noisy(10, CONFIG), all_of(loss.model), "-", device=CPU, workers=0, work=work)
    assert loss.calls == 0
    assert not work.exists()


def test_the_gradient_is_clipped_as_a_whole_or_not_at_all():
    for most, factor in ((None, 1.0), (2.5, 0.5), (100.0, 1.0)):
        weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert fitting._clipped(weights, most).item() == 5.0
        assert [weights[0].grad.item(), weights[1].grad.item()] == pytest.approx([3 * factor, 4 * factor], rel=1e-5)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_passes_and_never_of_the_weights(precision, expected):
    model, seen = small_model(), set()

    def loss(batch):
        out = model(torch.ones(2, 3))
        seen.add(out.dtype)
        return out.float().mean()

    config = CONFIG.model_copy(update={"precision": precision})
    fit(model, loss, Noisy(10, config), all_of(model), "-", device=CPU, workers=0)
    assert seen == {expected}
    assert model[0].weight.dtype == torch.float32


def test_an_average_follows_the_weights():
    model = nn.BatchNorm1d(1)
    average = Average(model, 0.75)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.num_batches_tracked.fill_(7)
    average.update(1)
    assert average.model.weight.item() == 0.75 * 1 + 0.25 * 5
    assert average.model.num_batches_tracked.item() == 7
    average.update(2)
    assert average.model.weight.item() == 0.75 * 2 + 0.25 * 5


@pytest.mark.parametrize("steps", [199, 200, 401])
def test_checkpoints_are_written_now_and_then_and_at_the_end(tmp_path, monkeypatch, steps):
    saved = []
    monkeypatch.setattr(fitting.FitCheckpoint, "save", lambda self, step, besides: saved.append(step))
    trained(tmp_path, FitConfig(steps=steps, train_batch_size=2))
    assert saved == sorted({*range(200, steps + 1, 200), steps})


def _exact():
    """A training without chance but the order, in float64."""
    model = small_model(torch.float64, dropout=0.0)
    average = Average(model, 0.8)
    curve = fit(
        model, SmallLoss(model, torch.float64, noisy=0.0), Noisy(10, CONFIG), all_of(model), "-", device=CPU,
        workers=0, after_step=average.update, also={"average": average.model},
    )  # fmt: skip
    return model.state_dict(), average.model.state_dict(), curve


def _rank(folder):
    with distributed.session() as place:
        assert place.ranks == 2
        found = {"exact": _exact(), "noise": Noisy(10, CONFIG)[0][1]}
        work = folder / "work"
        try:
            trained(work, signal_at=3 if place.rank == 1 else None)
        except Interrupted as stopped:
            found["status"] = stopped.code
        found["gone_on"] = trained(work)
        found["whole"] = trained()
        torch.save(found, folder / f"found.{place.rank}")


def test_two_ranks_train_as_one_and_are_interrupted_as_one(tmp_path):
    processes = Processes(_rank, tmp_path, ranks=2, output=tmp_path / "printed")
    processes.finish()
    printed = [processes.printed(rank) for rank in range(2)]
    first, second = (torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2))
    alone = _exact()
    for found in (first, second):
        for ours, theirs in zip(found["exact"][:2], alone[:2], strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)
        assert [loss for _, loss in found["exact"][2]] == pytest.approx([loss for _, loss in alone[2]], rel=1e-6)
        assert found["status"] == 130
        for name, value in found["whole"][0].items():
            assert torch.equal(found["gone_on"][0][name], value)
            assert torch.equal(value, first["whole"][0][name])
    assert not torch.equal(first["noise"], second["noise"])
    assert printed[0].count("Stopped and saved at step 3 of 9") == 1
    assert "Stopped" not in printed[1]


def test_a_duration_of_warm_up_must_be_one():
    assert FitConfig(warmup="5 epochs").warmup == Duration(amount=5, unit="epochs")
    for wrong in ({"warmup": 5}, {"lr": 0}, {"train_batch_size": 0}, {"steps": 0}, {"clip_norm": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FitConfig(**wrong)
