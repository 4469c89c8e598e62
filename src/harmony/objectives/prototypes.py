"""What objectives have in common whose student predicts a slow head's distributions over prototypes.

DINO (arXiv 2104.14294), and after it iBOT, the text's self-distillation, MaskCLIP and DetailCLIP: a head and its slow
copy, targets kept from collapsing, a centre that moves after each update, a last layer that stays as it is at first.

Shapes: M tokens, K prototypes.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from harmony.models.heads import HeadConfig, PrototypeHead
from harmony.models.towers import slow_copy
from harmony.objectives.base import Objective, ObjectiveConfig
from harmony.objectives.targets import Centre, Centring, Momentum, centred, full_precision, sinkhorn_knopp
from harmony.schedules import At, Duration, DurationField, Positive, Schedule


class PrototypeConfig(ObjectiveConfig):
    """Settings of every such objective."""

    student_temperature: Annotated[Positive, Field(description="temperature of the student's softmax")] = (
        Schedule.constant(0.1)
    )
    teacher_temperature: Annotated[Positive, Field(description="temperature of the targets")] = Schedule.parse(
        {"linear": {"from": 0.04, "to": 0.07, "over": "5 epochs"}}
    )
    centring: Centring = "momentum"
    centre_momentum: Momentum = 0.9
    freeze_prototypes: Annotated[
        DurationField, Field(description="how long the last layer of its own head stays as it is")
    ] = Duration(amount=1, unit="epochs")


class PrototypeObjective(Objective):
    """An objective with a prototype head. A subclass calls `own_head` when it is built, and observes its `centre`.

    Attributes:
        head, teacher_head: the head and its slow copy.
        centre: running mean of the teacher's scores.
    """

    head: PrototypeHead
    teacher_head: PrototypeHead
    centre: Centre
    config: PrototypeConfig

    def own_head(self, width: int, config: HeadConfig) -> None:
        """Build head, slow copy and centre for tokens of `width`."""
        self.head = PrototypeHead(width, config)
        self.teacher_head = slow_copy(self.head)
        self.centre = Centre(config.prototypes, self.config.centre_momentum)

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [(self.head, self.teacher_head)]

    def log_predictions(self, scores: Tensor, at: At) -> Tensor:
        """(..., K) scores of the student -> log-distributions."""
        return (full_precision(scores) / at.student_temperature).log_softmax(dim=-1)

    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        """(M, K) teacher scores -> (M, K) target distributions."""
        if self.config.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, temperature)
        return centred(scores, self.centre, temperature)

    def before_update(self, at: At) -> None:
        if at.clock.step < self.config.freeze_prototypes.steps(at.clock):
            self.head.prototypes.direction.grad = None

    def after_update(self, at: At) -> None:
        self.centre.update()
