import pytest
from pydantic import ValidationError

from harmony.errors import UserError
from harmony.evaluation import settings, tasks
from harmony.evaluation.settings import EvaluationConfig


def test_every_task_has_a_name_and_settings():
    for task in settings.TASKS:
        assert getattr(EvaluationConfig(), task).model_config["extra"] == "forbid"
        module = tasks.task_named(task)
        assert all(callable(getattr(module, name)) for name in ("missing", "card", "run"))


def test_one_task_may_be_written_alone():
    assert EvaluationConfig(tasks="zero_shot").tasks == ("zero_shot",)
    assert EvaluationConfig(tasks=["retrieval"]).tasks == ("retrieval",)
    assert EvaluationConfig(tasks=[]).tasks == ()
    assert EvaluationConfig().tasks == "auto"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ["zero_shots"]}, "did you mean 'zero_shot'"),
        ({"workers": -1}, "from 0 to 1024"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"zero_shot": {"template": "plain"}}, "template"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig(**values)


def test_settings_for_one_task_need_no_prefix():
    config = tasks.config_for("zero_shot", {"templates": "openai", "batch_size": 7})
    assert (config.zero_shot.templates, config.batch_size) == ("openai", 7)
    assert tasks.config_for("retrieval", {"retrieval.captions": 2}).retrieval.captions == 2


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("zero_shot", {"tempaltes": "openai"}, "unknown setting of zero_shot 'tempaltes'; did you mean 'templates'"),
        ("retrieval", {"templates": "openai"}, "unknown setting of retrieval 'templates'"),
        ("zero_shot", {"batch_size": "many"}, "batch_size must be a whole number"),
    ],
)
def test_wrong_settings_for_one_task(task, values, message):
    with pytest.raises(UserError, match=message):
        tasks.config_for(task, values)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("fine_tune.step", "unknown setting of fine_tune 'step'; did you mean 'steps'"),
        ("linear.steps", "linear.steps is a setting of linear, and the task is fine_tune; leave it out"),
        ("zzzz", r"batch_size.*, precision, randaugment, .*, workers$"),  # precision once, though two settings have it
    ],
)
def test_a_wrong_key_is_answered_with_the_task_s_own(key, message):
    with pytest.raises(UserError, match=message):
        tasks.config_for("fine_tune", {key: 3})
