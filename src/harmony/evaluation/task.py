"""The contract of a task: what it is given, and what it says of its own protocol.

A task is a module with three functions:

    missing(setup)  why it cannot be done with this encoder and data, in one sentence that says what to change; or None
    card(setup)     its protocol in a few lines
    run(setup)      -> Outcome

Everything that is wrong with the input is found by `missing`, or by `run` before it trains or writes anything.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from harmony.data.decode import MAX_PIXELS
from harmony.data.sources import Source
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.features import Features
from harmony.evaluation.settings import EvaluationConfig


@dataclass(frozen=True)
class Card:
    """A protocol card: what was done, so that somebody else can do it again.

    Attributes:
        resolution: size and crop of the images.
        split: what was learned from, and what was measured on.
        selection: how anything was chosen, and on what; never on the data measured on.
        optimiser: what trained the weights, if any were.
        schedule: for how long, and how its settings changed.
        differs: what the papers do otherwise, and why it is done so here.
    """

    resolution: str
    split: str
    selection: str
    optimiser: str
    schedule: str
    differs: str

    def rows(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def measured_on_itself(train: Source, data: Source, task: str) -> str | None:
    """Why a task must not learn from `train` and be measured on `data`, if they are the same; None when they differ."""
    same = train.class_names == data.class_names and train.stamp() == data.stamp() and len(train) == len(data)
    if same or train.shares_examples(data):
        return f"{task} would be measured on what it learned from, {data.uri}; name other --train-data"
    return None


@dataclass
class Setup:
    """What a task is given.

    Attributes:
        encoder: what is measured.
        data: what it is measured on.
        train: labelled data to learn from, for tasks that learn; None when there is none.
        config: the settings of evaluation, each task's own among them.
        work: folder where a task that trains keeps its checkpoints and leaves its weights; None keeps nothing.
        max_pixels: images with more pixels count as bad.
    """

    encoder: Encoder
    data: Source
    train: Source | None
    config: EvaluationConfig
    work: Path | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self._features: dict[Source, Features] = {}  # not by URI: options beside it may tell two sources apart

    @property
    def size(self) -> int:
        """Side in px of the images that the encoder is given."""
        return self.config.size or self.encoder.size

    def shown(self, source: Source) -> str:
        """A source as a card names it: by URI, and how much of it `max_examples` leaves."""
        most = self.config.max_examples
        if most is None or most >= len(source):
            return source.uri
        return f"{source.uri} ({most:,} of its {len(source):,} examples, spread evenly)"

    def features(self, source: Source) -> Features:
        """What the encoder makes of a source; encoded once, whichever tasks ask."""
        if source not in self._features:
            self._features[source] = Features(self.encoder, source, self.config, self.max_pixels)
        return self._features[source]
