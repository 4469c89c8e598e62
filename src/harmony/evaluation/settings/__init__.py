"""The settings of evaluation: the recipe's `evaluation`, and what `harmony evaluate --set key=value` may say."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from harmony.errors import unknown
from harmony.evaluation.settings.base import FitConfig, Settings, one_or_many
from harmony.evaluation.settings.detection import DetectionConfig
from harmony.evaluation.settings.fine_tune import FineTuneConfig
from harmony.evaluation.settings.knn import KnnConfig
from harmony.evaluation.settings.linear import LinearConfig
from harmony.evaluation.settings.retrieval import RetrievalConfig
from harmony.evaluation.settings.segmentation import SegmentationConfig
from harmony.evaluation.settings.zero_shot import ZeroShotConfig

__all__ = [
    "TASKS",
    "DetectionConfig",
    "EvaluationConfig",
    "FineTuneConfig",
    "FitConfig",
    "KnnConfig",
    "LinearConfig",
    "RetrievalConfig",
    "SegmentationConfig",
    "ZeroShotConfig",
]

TASKS = ("zero_shot", "retrieval", "knn", "linear", "fine_tune", "segmentation", "detection")
"""The names of the tasks; `harmony.evaluation.tasks` holds what they do."""


class EvaluationConfig(Settings):
    """What is measured once a run has ended, on `data.val`, and how features are extracted."""

    tasks: Annotated[tuple[str, ...] | Literal["auto"], BeforeValidator(one_or_many)] = Field(
        "auto",
        description=f"tasks to run: {', '.join(TASKS)}; auto runs zero_shot and retrieval where the data can answer "
        "them (by its class names and captions)",
    )
    train: str | None = Field(
        None, min_length=1, description="labelled data that knn, linear, ... learn from; the run's own if null"
    )
    model: Literal["teacher", "student"] = Field(
        "teacher", description="which copy of the towers is measured; a run without a teacher has only a student"
    )
    size: int | None = Field(
        None,
        ge=1,
        description="side in px of the images the encoder is given, positions resized to it; its own if null",
    )
    batch_size: int = Field(128, ge=1, le=65536, description="images, or captions, encoded at a time")
    workers: int | Literal["auto"] = Field(
        "auto", description="processes that read and decode images; 0 does it in the main process"
    )
    max_examples: int | None = Field(
        None, ge=1, description="evaluate on this many examples, spread evenly over the data; all of them if null"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the encoder when features are made")
    features: str | None = Field(
        "auto",
        min_length=1,
        description="folder where features are kept and found again; auto is harmony/features in the user's cache "
        "folder ($XDG_CACHE_HOME, or ~/.cache), null keeps nothing",
    )
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    detection: DetectionConfig = DetectionConfig()

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for task in () if isinstance(tasks, str) else tasks:
            if task not in TASKS:
                raise ValueError(str(unknown("task", task, TASKS)))
        return tasks

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and not 0 <= workers <= 1024:
            raise ValueError("must be auto or from 0 to 1024")
        return workers
