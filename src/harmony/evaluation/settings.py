"""The settings of evaluation: the recipe's `evaluation`, and what `harmony evaluate --set key=value` may say."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from harmony.errors import unknown

TASKS = ("retrieval", "zero_shot")
"""The names of the tasks; `harmony.evaluation.tasks` holds what they do."""


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "auto" else value


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ZeroShotConfig(_Settings):
    """Classification by the text tower's reading of the class names."""

    templates: str = Field(
        "plain",
        min_length=1,
        description="templates class names are put in: plain (six short ones), openai (the 80 that CLIP used "
        "on ImageNet), or a text file with one template a line, {} standing for the name",
    )


class RetrievalConfig(_Settings):
    """Finding images by captions and captions by images."""

    captions: int | None = Field(
        None, ge=1, description="use at most this many captions an image, the first ones; all of them if null"
    )


class EvaluationConfig(_Settings):
    """What is measured once a run has ended, on `data.val`, and how features are extracted."""

    tasks: Annotated[tuple[str, ...] | Literal["auto"], BeforeValidator(_one_or_many)] = Field(
        "auto",
        description="tasks to run: zero_shot, retrieval; auto runs those that the data can answer (by its class names "
        "and captions)",
    )
    model: Literal["teacher", "student"] = Field(
        "teacher", description="which copy of the towers is measured; a run without a teacher has only a student"
    )
    batch_size: int = Field(128, ge=1, le=65536, description="images, or captions, encoded at a time")
    workers: int | Literal["auto"] = Field(
        "auto", description="processes that read and decode images; 0 does it in the main process"
    )
    max_examples: int | None = Field(
        None, ge=1, description="evaluate on this many examples, spread evenly over the data; all of them if null"
    )
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    retrieval: RetrievalConfig = RetrievalConfig()

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
