"""Settings of the data, as a recipe writes them under `data:`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from harmony.data.captions import CaptionAugment
from harmony.data.decode import LARGEST_LIMIT, MAX_PIXELS
from harmony.data.sources.base import SourceOptions


class DataConfig(BaseModel):
    """What is trained on, and how it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Annotated[str, Field(description="URI of the data to train on: shards:, table:, folder:, scenes:, ...")] = (
        "???"
    )
    val: Annotated[str | None, Field(description="URI of the data to evaluate on after training")] = None
    batch_size: Annotated[
        int, Field(ge=1, description="examples an optimiser step, over all ranks and accumulated parts together")
    ] = 96
    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | Literal["auto"],
        Field(description="processes a rank that read and cut images; 0 does it in the training process"),
    ] = "auto"
    caption_key: Annotated[
        str | None,
        Field(min_length=1, description="where captions are: a column, a json key or the ending of a text file"),
    ] = None
    image_key: Annotated[
        str | None, Field(min_length=1, description="where images are: a column or the ending of a file")
    ] = None
    caption_augment: Annotated[
        CaptionAugment | None,
        Field(description="random changes to the words of captions, as {delete: 0.1, swap: 0.1}; null for none"),
    ] = None
    max_bad_share: Annotated[
        float, Field(ge=0, le=1, description="share of bad examples above which the run stops")
    ] = 0.05
    max_pixels: Annotated[
        int, Field(ge=1, le=LARGEST_LIMIT, description="width times height above which an image counts as bad")
    ] = MAX_PIXELS
    shuffle: Annotated[bool, Field(description="a new random order each epoch; false keeps the source's order")] = True
    chance: Annotated[
        Literal["example", "position"],
        Field(
            description="what owns a random stream: each example in each epoch; or (the published code's quirk C20) "
            "each place in a rank's batch, the same on every rank"
        ),
    ] = "example"

    @property
    def options(self) -> SourceOptions:
        """How the sources are to be opened."""
        return SourceOptions(caption_key=self.caption_key, image_key=self.image_key)
