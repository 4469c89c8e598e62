"""What objectives have in common whose student predicts a slow head's distributions over prototypes.

DINO (arXiv 2104.14294), and after it iBOT, the text's self-distillation, MaskCLIP and DetailCLIP: a head and its slow
copy, targets kept from collapsing, a centre that moves after each update, a last layer that stays as it is at first.

Shapes: M tokens, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from harmony.errors import UserError
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
        head, teacher_head: the head and its slow copy, where it has its own.
        lender: the objective whose heads it uses, where it has none.
        centre: running mean of the teacher's scores.
    """

    lends_head: ClassVar[bool] = False
    """Whether its head is for tokens of the image tower, so that others can use it as well."""
    head: PrototypeHead
    teacher_head: PrototypeHead
    lender: "PrototypeObjective | None" = None
    centre: Centre
    config: PrototypeConfig

    def own_head(self, width: int, config: HeadConfig) -> None:
        """Build head, slow copy and centre for tokens of `width`."""
        self.head = PrototypeHead(width, config)
        self.teacher_head = slow_copy(self.head)
        self.centre = Centre(config.prototypes, self.config.centre_momentum)

    def borrow_head(self, name: str, others: Mapping[str, Objective]) -> None:
        """Use the heads of the objective of that name."""
        lender = others.get(name)
        if not (isinstance(lender, PrototypeObjective) and lender.lends_head):
            raise UserError(
                f"objective {self.config.type or type(self).__name__.lower()} borrows the head of {name!r}, which is "
                f"not a dino objective of this recipe; give it a head of its own, as in {{prototypes: 8192}}, or keep "
                f"objectives.{name} with weight 0"
            )
        # Kept outside the module tree: the head's parameters belong to the lender.
        object.__setattr__(self, "lender", lender)
        self.centre = Centre(lender.centre.prototypes, self.config.centre_momentum)

    def heads(self) -> tuple[PrototypeHead, PrototypeHead]:
        """Head and slow copy, its own or those it borrows."""
        owner = self.lender or self
        return owner.head, owner.teacher_head

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [] if self.lender else [(self.head, self.teacher_head)]

    def log_predictions(self, scores: Tensor, at: At) -> Tensor:
        """(..., K) scores of the student -> log-distributions."""
        return (full_precision(scores) / at.student_temperature).log_softmax(dim=-1)

    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        """(M, K) teacher scores -> (M, K) target distributions."""
        if self.config.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, temperature)
        return centred(scores, self.centre, temperature)

    def before_update(self, at: At) -> None:
        if not self.lender and at.clock.step < self.config.freeze_prototypes.steps(at.clock):
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None

    def after_update(self, at: At) -> None:
        self.centre.update()
