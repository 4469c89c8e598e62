"""Schedules: what a recipe may write, and their values at every place of runs of any length."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from harmony.schedules import At, Clock, Duration, Positive, Schedule, Share

numbers = st.floats(-10, 10, allow_nan=False)


class Settings(BaseModel):
    share: Share = Schedule.constant(0.5)
    factor: Positive = Schedule.constant(1.0)


@given(numbers, numbers, st.integers(1, 500), st.integers(1, 50))
def test_a_cosine_runs_from_start_to_stop(start: float, stop: float, steps: int, epoch_steps: int):
    schedule = Schedule.parse({"cosine": {"from": start, "to": stop}})
    at = [schedule(Clock(step, steps, epoch_steps)) for step in range(steps + 1)]
    assert at[0] == pytest.approx(start) and at[-1] == pytest.approx(stop, abs=1e-9)
    steps_down = [b - a for a, b in pairwise(at)]
    assert all(d * (stop - start) >= -1e-9 for d in steps_down), "monotonic"
    assert schedule(Clock(steps // 2 * 2, steps // 2 * 4 or 1, 1)) == pytest.approx((start + stop) / 2) or steps < 2


@given(st.integers(1, 1000), st.integers(1, 100), st.floats(0.1, 100))
def test_a_schedule_longer_than_the_run_is_valid(steps: int, epoch_steps: int, epochs: float):
    schedule = Schedule.parse({"linear": {"from": 0.0, "to": 1.0, "over": f"{epochs} epochs"}})
    for step in (0, steps // 2, steps):
        expected = min(1.0, step / (epochs * epoch_steps))
        assert schedule(Clock(step, steps, epoch_steps)) == pytest.approx(expected)


def test_the_published_hard_weight():
    schedule = Schedule.parse({"cosine": {"from": 1.0, "to": 0.2, "over": "10 epochs"}})
    for epoch in range(25):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * min(epoch, 10) / 10)) / 2
        assert schedule(Clock(epoch * 100, 2500, 100)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "steps"), [("10 epochs", 1000), ("1 epoch", 100), ("0.5 epochs", 50), ("7 steps", 7), ("30%", 600), (0, 0)]
)
def test_durations(text: object, steps: float):
    assert Duration.parse(text).steps(Clock(0, 2000, 100)) == pytest.approx(steps)


@pytest.mark.parametrize("text", ["10", "ten epochs", "3 weeks", "", None, "-1 epochs", True])
def test_what_is_no_duration(text: object):
    with pytest.raises(ValueError, match="write it as '10 epochs'"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"cosin": {"from": 1, "to": 0}}, "is not a schedule"),
        ({"cosine": {"from": 1}}, "needs from and to"),
        ({"cosine": {"from": 1, "to": 0, "ovr": "1 epoch"}}, "not ovr"),
        ({"cosine": {"from": 1, "to": 0, "over": "soon"}}, "not a duration"),
        ("fast", "is not a schedule"),
        (True, "is not a schedule"),
        (float("nan"), "not a finite number"),
        ({"linear": {"from": "x", "to": 0}}, "a number, not 'x'"),
    ],
)
def test_what_is_no_schedule(written: object, words: str):
    with pytest.raises(ValueError, match=words):
        Schedule.parse(written)


def test_bounds_hold_at_both_ends():
    Settings(share={"linear": {"from": 0, "to": 1}})
    for bad in (1.5, {"linear": {"from": 0.2, "to": 1.2}}, -0.1):
        with pytest.raises(ValidationError, match="must be"):
            Settings(share=bad)
    with pytest.raises(ValidationError, match="must be"):
        Settings(factor=0)


@given(
    st.one_of(numbers, st.builds(lambda a, b: {"cosine": {"from": a, "to": b, "over": "3 epochs"}}, numbers, numbers))
)
def test_written_and_read_again(written: object):
    schedule = Schedule.parse(written)
    assert Schedule.parse(schedule.written()) == schedule


def test_values_at_a_place():
    at = At(Settings(share={"linear": {"from": 0.0, "to": 1.0}}), Clock(5, 10, 5), logged=True)
    assert at.share == 0.5 and at.factor == 1.0 and at.logged and at.clock.epoch == 1
    with pytest.raises(AttributeError, match="no schedule named 'shape'"):
        _ = at.shape
