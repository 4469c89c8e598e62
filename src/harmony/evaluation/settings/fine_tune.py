"""Settings of fine-tuning."""

from harmony.evaluation.settings.base import FitConfig


class FineTuneConfig(FitConfig):
    """The whole encoder trained as a classifier."""
