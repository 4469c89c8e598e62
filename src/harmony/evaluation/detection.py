"""detection: boxes and masks around things."""

from harmony.evaluation.results import Outcome
from harmony.evaluation.task import Card, Setup


def missing(setup: Setup) -> str | None:
    """Why this data or encoder cannot be measured so; None when it can."""
    raise NotImplementedError


def card(setup: Setup) -> Card:
    """The protocol."""
    raise NotImplementedError


def run(setup: Setup) -> Outcome:
    """Measure."""
    raise NotImplementedError
