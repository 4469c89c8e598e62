"""Settings of semantic segmentation."""

from harmony.evaluation.settings.base import FitConfig


class SegmentationConfig(FitConfig):
    """A class for every pixel."""
