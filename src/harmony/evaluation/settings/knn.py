"""Settings of the nearest-neighbour vote."""

from harmony.evaluation.settings.base import Settings


class KnnConfig(Settings):
    """Classification by the nearest training images."""
