"""The loop's settings: the paper's numbers by default, and nothing that cannot be."""

import pytest
from pydantic import BaseModel, ValidationError

from harmony.schedules import Clock
from harmony.training.settings import EfficiencyConfig, OptimConfig, TeacherConfig, TrainConfig

ALL = (OptimConfig, TeacherConfig, TrainConfig, EfficiencyConfig)


def test_defaults_are_the_methods():
    optim, train, begin, end = OptimConfig(), TrainConfig(), Clock(0, 100, 4), Clock(100, 100, 4)
    assert (optim.lr, optim.final_lr, optim.betas, optim.eps, optim.clip_norm) == (5e-4, 1e-6, (0.9, 0.98), 1e-6, 3.0)
    assert (optim.weight_decay(begin), optim.weight_decay(end)) == (0.04, 0.4)
    assert (TeacherConfig().momentum(begin), TeacherConfig().momentum(end)) == (0.996, 1.0)
    assert str(optim.warmup) == "3 epochs"
    assert (train.epochs, train.steps, train.max_skipped_steps) == (25, None, 2)


@pytest.mark.parametrize("settings", ALL)
def test_settings_are_documented_and_survive_being_written(settings: type[BaseModel]):
    assert all(field.description for field in settings.model_fields.values())
    assert settings.model_validate(settings().model_dump(mode="json")) == settings()


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        (OptimConfig, "lr", 0),
        (OptimConfig, "lr", float("nan")),
        (OptimConfig, "betas", [0.9, 1.0]),
        (OptimConfig, "betas", [0.9]),
        (OptimConfig, "clip_norm", -1),
        (OptimConfig, "weight_decay", {"cosine": {"from": 0.1, "to": -0.1}}),
        (OptimConfig, "warmup", "a while"),
        (OptimConfig, "decay", "all"),
        (TeacherConfig, "momentum", 1.5),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "epochs", float("inf")),
        (TrainConfig, "steps", 0),
        (TrainConfig, "precision", "fp8"),
        (TrainConfig, "keep", 0),
        (TrainConfig, "log_every", "0 steps"),
        (TrainConfig, "checkpoint_every", 0),
        (TrainConfig, "loggers", "papyrus"),
        (TrainConfig, "seed", -1),
        (EfficiencyConfig, "backward", "both"),
        (EfficiencyConfig, "speed", "fast"),
    ],
)
def test_what_cannot_be_is_refused(settings: type[BaseModel], key: str, value: object):
    with pytest.raises(ValidationError):
        settings.model_validate({key: value})


def test_one_logger_needs_no_list():
    assert TrainConfig.model_validate({"loggers": "wandb"}).loggers == ["wandb"]
