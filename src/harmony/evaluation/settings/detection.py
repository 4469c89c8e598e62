"""Settings of detection."""

from harmony.evaluation.settings.base import FitConfig


class DetectionConfig(FitConfig):
    """Boxes, and masks where the data have them, around things."""
