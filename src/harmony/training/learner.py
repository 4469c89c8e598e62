"""The learner: student, teacher, objectives and plan of a recipe, and what one step computes with them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from harmony import ranks
from harmony.data.batch import Batch
from harmony.data.masks import MaskSampler, PatchSampler
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.interchange.frozen import frozen_models
from harmony.interchange.start import start_from
from harmony.models.blocks import PackedBlock
from harmony.models.frozen import FrozenModel
from harmony.models.recomputing import set_checkpointing
from harmony.models.teacher import Teacher
from harmony.models.towers import Towers, slow_copy
from harmony.objectives.base import Encoded, GuidedMask, Objective, TextRequest
from harmony.objectives.registry import kinds
from harmony.schedules import At, Clock
from harmony.training.diagnostics import feature_signs
from harmony.training.plan import Group, Plan, encode

if TYPE_CHECKING:
    from harmony.recipe import Recipe


@dataclass
class GroupLosses:
    """Losses of one group, ready for a backward pass.

    Attributes:
        objectives: names of the group's objectives.
        losses: unweighted scalars by name.
        weights: the factor of each loss at this step.
    """

    objectives: tuple[str, ...]
    losses: dict[str, Tensor]
    weights: dict[str, float]

    def total(self) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * loss for name, loss in self.losses.items()]).sum()


class Learner(nn.Module):
    """Everything that is trained, and its slow copies.

    Attributes:
        student: the towers that gradients train.
        teacher: their slow copies, which are what is evaluated.
        objectives: all objectives of the recipe by name; those of weight 0 keep their heads and masks but do not run.
        frozen: models that are given and never change, by name; checkpoints hold them too, so that a run needs nothing
            but itself to go on.
        plan: the passes of a step.
    """

    def __init__(
        self,
        towers: Towers,
        objectives: Mapping[str, Objective],
        views: Mapping[str, ViewConfig],
        joint: bool = False,
        frozen: Mapping[str, FrozenModel] | None = None,
    ) -> None:
        super().__init__()
        self.student = towers
        self.frozen = nn.ModuleDict(frozen or {})
        self.objectives = nn.ModuleDict(objectives)
        active = {name: objective for name, objective in objectives.items() if not objective.config.weight.is_zero}
        if not active:
            raise UserError("every objective has weight 0, so nothing would be trained; give one a weight")
        given = {name: model.image for name, model in (frozen or {}).items()}
        guided = self.guided_masks()
        self.plan = Plan(active, views, self.masks(), towers.text is not None, joint, given, guided)
        self.teacher = slow_copy(towers)
        self._slow = Teacher(self._pairs())
        self._signs: dict[str, Tensor] = {}
        self._active = tuple(active)

    def train(self, mode: bool = True) -> Self:
        """As usual, but slow and frozen models stay in evaluation mode: a target has no stochastic depth."""
        super().train(mode)
        self.frozen.eval()
        for _, slow in self._pairs():
            slow.eval()
        return self

    def _apply(self, *arguments: Any, **named: Any) -> Self:
        """What `to` and `double` do. They replace buffers, so that the pairs of tensors must be found anew."""
        super()._apply(*arguments, **named)
        self._slow = Teacher(self._pairs())
        return self

    def masks(self) -> dict[str, MaskSampler]:
        """All masks to be drawn for each batch, by name."""
        self._check_names_of_masks()
        return {mask: sampler for _, one in self._named_objectives() for mask, sampler in one.masks().items()}

    def guided_masks(self) -> dict[str, GuidedMask]:
        """All masks that can be drawn from what the teacher sees, by name."""
        return {mask: guided for _, one in self._named_objectives() for mask, guided in one.guided_masks().items()}

    def _check_names_of_masks(self) -> None:
        known: set[str] = set()
        for name, objective in self._named_objectives():
            for mask in (*objective.masks(), *objective.guided_masks()):
                if mask in known:
                    raise UserError(
                        f"objective {name} draws a mask {mask!r}, as another one does; remove one of the two"
                    )
                known.add(mask)

    def views(self) -> set[str]:
        """Names of the views that a batch must have: those that are encoded, and those that masks are drawn on."""
        return self.plan.views | {mask.view for mask in self.masks().values() if isinstance(mask, PatchSampler)}

    def needs_labels(self) -> bool:
        """Whether a batch must have labels, because an objective that runs is supervised."""
        return any(self._objective(name).needs_labels for name in self._active)

    def check_part(self, images: int) -> None:
        """Raise UserError when an objective that runs cannot learn from parts of a step of so many images."""
        of_rank = images // ranks.count()
        for name in self._active:
            objective = self._objective(name)
            if objective.compares_images and (of_rank if objective.within_rank else images) < 2:
                each = " for each process" if images > 1 else ""
                raise UserError(
                    f"objective {name} compares images with each other, and a part of a step has only one{each}; "
                    "raise data.batch_size, lower train.accumulate or start fewer processes"
                )

    def losses_by_group(self, batch: Batch, clock: Clock, logged: bool = False) -> Iterator[GroupLosses]:
        """Losses group by group; call backward on each before asking for the next, so that its activations are freed.

        Args:
            batch: the micro-batch, augmented and on the learner's device.
            clock: the place in the run.
            logged: whether signs of this step will be read.
        """
        given = self.given(batch)
        batch = self.plan.with_guided(batch, given)
        self._signs = {}
        for group in self.plan.groups:
            encoded = given.joined(encode(group.student, self.student, batch))
            yield self._losses(group, batch, encoded, clock, logged)
            if logged:
                self._signs |= _signs_of_features(encoded)
            del encoded  # or it would be alive while the next group is encoded

    @torch.no_grad()
    def given(self, batch: Batch) -> Encoded:
        """What the teacher and the frozen models make of a batch."""
        encoded = encode(self.plan.teacher, self.teacher, batch)
        for passes in self.plan.frozen:
            encoded = encoded.joined(encode(passes, self.model(passes.model), batch))
        return encoded

    def model(self, name: str) -> Towers | FrozenModel:
        """The towers that a request names."""
        if name in ("student", "teacher"):
            return self.student if name == "student" else self.teacher
        model = self.frozen[name]
        assert isinstance(model, FrozenModel)
        return model

    def _losses(self, group: Group, batch: Batch, encoded: Encoded, clock: Clock, logged: bool) -> GroupLosses:
        result = GroupLosses(group.objectives, {}, {})
        for name in group.objectives:
            objective = self._objective(name)
            at = At(objective.config, clock, logged)
            losses = objective(batch, encoded, at)
            result.losses |= _named(name, losses)
            result.weights |= dict.fromkeys(_named(name, losses), at.weight)
            if logged:
                self._signs |= {f"{name}/{sign}": value.detach() for sign, value in objective.signs.items()}
        return result

    def before_update(self, clock: Clock) -> None:
        """Between backward and the optimiser: what objectives do to their gradients."""
        for _, objective in self._named_objectives():  # one of weight 0, too: another may use its head
            objective.before_update(At(objective.config, clock))

    @torch.no_grad()
    def after_update(self, clock: Clock, momentum: float, made: Tensor) -> None:
        """After the optimiser: centres and queues, then the slow copies with the given momentum.

        Where `made`, a truth value of no dimension on the device, is false, the step's update was left out, and all
        stays as it was, without anyone waiting to know.
        """
        for name in self._active:
            objective = self._objective(name)
            with kept_unless(made, objective):
                objective.after_update(At(objective.config, clock))
        self._slow.update(momentum, made)

    def signs(self) -> dict[str, Tensor]:
        """Signs of the last logged step by name, detached scalars; of this rank unless an objective says more."""
        return dict(self._signs)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by part: the image tower, the text tower, each objective."""
        modules: dict[str, nn.Module] = {"image": self.student.image}
        if self.student.text is not None:
            modules["text"] = self.student.text
        modules |= dict(self._named_objectives())
        parts = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
        return {name: parameters for name, parameters in parts.items() if parameters}

    def _named_objectives(self) -> Iterator[tuple[str, Objective]]:
        for name, objective in self.objectives.items():
            assert isinstance(objective, Objective)
            yield name, objective

    def _objective(self, name: str) -> Objective:
        objective = self.objectives[name]
        assert isinstance(objective, Objective)
        return objective

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.student, self.teacher)]
        return pairs + [pair for _, objective in self._named_objectives() for pair in objective.slow_twins()]


def build_learner(recipe: "Recipe") -> Learner:
    """The learner of a recipe, its weights drawn from torch's generator or taken from what `init` names.

    Raises:
        UserError: something in the recipe does not fit together, or first weights cannot be loaded.
    """
    size = max(view.size for view in recipe.views.values())
    towers = Towers(recipe.model, size)
    start_from(towers, recipe.model.init)
    classes = kinds()
    objectives = {
        name: classes[config.type or name](config, towers, recipe.views) for name, config in recipe.objectives.items()
    }
    frozen = frozen_models(recipe.frozen, recipe.model.image, size)
    for objective in objectives.values():
        objective.meet({name: model.image for name, model in frozen.items()})
        objective.borrow(objectives)
    joint = recipe.efficiency.backward == "joint"
    learner = Learner(towers, objectives, recipe.views, joint, frozen).train()
    set_checkpointing(learner, recipe.efficiency.checkpointing)
    if recipe.efficiency.compile:
        compile_blocks(learner)
    return learner


def compile_blocks(learner: Learner) -> None:
    """Compile all models' image blocks; after checkpointing is set, before anything is sharded."""
    for name in ("student", "teacher", *learner.frozen):
        for block in learner.model(name).image.trunk.blocks:
            assert isinstance(block, PackedBlock)
            block.packed = torch.compile(block.packed, dynamic=True)  # type: ignore[method-assign]
            block.packed_first = torch.compile(block.packed_first, dynamic=True)  # type: ignore[method-assign]


@contextmanager
def kept_unless(made: Tensor, objective: Objective) -> Iterator[None]:
    """Put back what an objective changes of its tensors within the block, on the device, where `made` is false."""
    if type(objective).after_update is Objective.after_update:
        yield
        return
    slow = {id(tensor) for _, twin in objective.slow_twins() for tensor in twin.state_dict(keep_vars=True).values()}
    before = {name: t.clone() for name, t in _tensors(objective) if id(t) not in slow}
    yield
    for name, tensor in _tensors(objective):
        if name in before:
            tensor.copy_(torch.where(made, tensor, before[name]))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _named(objective: str, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses under the objective's own name in the recipe: `mae`, or `mae/part` when it has several."""
    if len(losses) == 1:
        return {objective: next(iter(losses.values()))}
    return {f"{objective}/{part}": loss for part, loss in losses.items()}


@torch.no_grad()
def _signs_of_features(encoded: Encoded) -> dict[str, Tensor]:
    """Rank and spread of each model's features, of the largest crops that it sees whole and of whole captions."""
    features: dict[str, Tensor] = {}
    largest: dict[str, int] = {}
    for request in encoded:
        if request.replace is not None:
            continue
        if isinstance(request, TextRequest):
            features[f"{request.model}_text"] = encoded.text(request).embed()
        elif request.keep is None:
            encoding, name = encoded.image(request), f"{request.model}_image"
            if encoding.length > largest.get(name, 0):
                largest[name] = encoding.length
                features[name] = encoding.cls[0]
    return {f"{name}/{sign}": v for name, x in features.items() for sign, v in feature_signs(x.float()).items()}
