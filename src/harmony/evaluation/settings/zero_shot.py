"""Settings of zero-shot classification."""

from pydantic import Field

from harmony.evaluation.settings.base import Settings


class ZeroShotConfig(Settings):
    """Classification by the text tower's reading of the class names."""

    templates: str = Field(
        "plain",
        min_length=1,
        description="templates class names are put in: plain (six short ones), openai (the 80 that CLIP used "
        "on ImageNet), or a text file with one template a line, {} standing for the name",
    )
    classes: str | None = Field(
        None,
        min_length=1,
        description="names of the classes in the order of the labels: imagenet (the 1000 that open_clip prompts with), "
        "a text file with one name a line, or a json list or classes.json; the data's own if null",
    )
