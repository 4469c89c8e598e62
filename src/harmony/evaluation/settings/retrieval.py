"""Settings of retrieval."""

from pydantic import Field

from harmony.evaluation.settings.base import Settings


class RetrievalConfig(Settings):
    """Finding images by captions and captions by images."""

    captions: int | None = Field(
        None, ge=1, description="use at most this many captions an image, the first ones; all of them if null"
    )
