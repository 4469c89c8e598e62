"""Settings of the linear probe."""

from harmony.evaluation.settings.base import Settings


class LinearConfig(Settings):
    """A linear classifier on frozen features."""
