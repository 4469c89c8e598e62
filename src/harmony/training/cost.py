"""What a recipe costs, counted before anything is trained.

The recipe's own learner makes its own step, on tensors that have shapes but no contents, so nothing is estimated by
formula. Floating-point operations are what PyTorch's FlopCounterMode sees: a multiply-add is two, and what a kernel
computes again in backward to save memory does not count. Memory is what is alive at the fullest moment; the workspace
of kernels, the fragments between allocations, and what the driver keeps (about 1 GB on a GPU) come on top.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harmony.chance import Chance
from harmony.data.batch import Batch
from harmony.data.masks import PatchSampler
from harmony.errors import UserError
from harmony.models.encodings import ImageEncoding, TextEncoding
from harmony.models.text import VOCABULARY
from harmony.objectives.base import Encoded, ImageRequest, Objective, Request
from harmony.recipe import Recipe
from harmony.schedules import At, Clock
from harmony.training.learner import Learner, build_learner
from harmony.training.plan import Passes, encode

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Result = TypeVar("Result")

_CLOCK = Clock(step=0, steps=1000, epoch_steps=100)


@dataclass(frozen=True)
class Pass:
    """One encoder pass.

    Attributes:
        model: "student" or "teacher".
        request: what is encoded.
        asked_by: the objectives it serves.
        tokens: tokens an example.
        flops: operations an example, forward and, for the student, backward.
    """

    model: str
    request: Request
    asked_by: tuple[str, ...]
    tokens: float
    flops: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the fullest moment of a step.

    Attributes:
        weights: student, teacher and heads, in fp32.
        optimiser: AdamW's two running means.
        groups: for each group of objectives, what else is alive at its fullest moment: activations, gradients so far,
            working copies of weights, the batch.
    """

    weights: int
    optimiser: int
    groups: dict[tuple[str, ...], int]

    @property
    def total(self) -> int:
        return self.weights + self.optimiser + max(self.groups.values())


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Attributes:
        name: the recipe's.
        examples: image-caption pairs one process encodes at a time.
        caption_tokens: tokens of every caption, begin and end included.
        precision: of the passes.
        trained: trained parameters by part.
        slow: parameters of the slow copies.
        passes: all encoder passes of a step.
        heads: by objective, operations an example of its heads and loss, forward and backward.
        memory: of one process.
    """

    name: str
    examples: int
    caption_tokens: int
    precision: str
    trained: dict[str, int]
    slow: int
    passes: list[Pass]
    heads: dict[str, float]
    memory: Memory

    @property
    def flops(self) -> float:
        """Operations an example in all."""
        return sum(one.flops for one in self.passes) + sum(self.heads.values())

    def flops_of(self, objective: str) -> float:
        """Operations an example of one objective: its heads, and its even share of every pass it asked for."""
        shares = (one.flops / len(one.asked_by) for one in self.passes if objective in one.asked_by)
        return self.heads[objective] + sum(shares)


def cost_of(recipe: Recipe, caption_tokens: int = 24, processes: int = 1) -> Cost:
    """Count one step of a recipe.

    Args:
        recipe: its data need not be given.
        caption_tokens: tokens of the longest caption of a batch, to which all are padded; about 24 for web captions.
        processes: over how many the batch is spread.

    Raises:
        UserError: something in the recipe does not fit together.
    """
    parts = processes * recipe.train.accumulate
    if recipe.data.batch_size % parts:
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} cannot be spread over {processes} processes with "
            f"train.accumulate {recipe.train.accumulate}; make it a multiple of {parts}"
        )
    learner, examples = _empty_learner(recipe), recipe.data.batch_size // parts
    batch = _batch(recipe, learner, examples, caption_tokens)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        learner.to_empty(device="cpu")
        batch = batch.map(fake.from_tensor)
        batch.images = {name: torch.empty(v.count, examples, 3, v.size, v.size) for name, v in recipe.views.items()}
        groups = dict(_fullest_moments(learner, batch, _DTYPES[recipe.train.precision]))
        passes, heads = list(_passes(learner, batch)), dict(_heads(learner, batch))
    trained = {part: sum(p.numel() for p in parameters) for part, parameters in learner.parts().items()}
    return Cost(
        name=recipe.name,
        examples=examples,
        caption_tokens=next((tokens.shape[1] for tokens in batch.captions.values()), 0),
        precision=recipe.train.precision,
        trained=trained,
        slow=sum(p.numel() for p in learner.parameters() if not p.requires_grad),
        passes=passes,
        heads=heads,
        memory=Memory(
            weights=sum(tensor.nbytes for tensor in learner.state_dict().values()),
            optimiser=2 * 4 * sum(trained.values()),
            groups=groups,
        ),
    )


def _empty_learner(recipe: Recipe) -> Learner:
    """The recipe's learner without memory for its weights."""
    model = recipe.model.model_copy(update={"init": None})
    efficiency = recipe.efficiency.model_copy(update={"compile": False})
    with torch.device("meta"):
        return build_learner(recipe.model_copy(update={"model": model, "efficiency": efficiency}))


def _batch(recipe: Recipe, learner: Learner, examples: int, caption_tokens: int) -> Batch:
    """A batch with everything but pixels: captions of one length, and masks as the recipe draws them."""
    chance = Chance.of_examples(recipe.train.seed, 0, torch.arange(examples))
    batch = Batch([str(number) for number in range(examples)], chance)
    if recipe.model.text is not None:
        words = max(1, min(caption_tokens, recipe.model.text.context) - 2)
        begin, end = torch.full((examples, 1), VOCABULARY - 2), torch.full((examples, 1), VOCABULARY - 1)
        batch.captions = {"caption": torch.cat([begin, torch.full((examples, words), 1), end], dim=1)}
    for name, sampler in learner.masks().items():
        if isinstance(sampler, PatchSampler):
            view = recipe.views[sampler.view]
            grid = learner.student.image.grid(view.size)
            batch.masks[name] = sampler.draw(name, chance, view.count, grid, _CLOCK)
        else:
            batch.masks[name] = sampler.draw(name, chance, batch.captions[sampler.stream], _CLOCK)
    return batch


def _active(learner: Learner) -> list[str]:
    return [name for group in learner.plan.groups for name in group.objectives]


def _objective(learner: Learner, name: str) -> Objective:
    objective = learner.objectives[name]
    assert isinstance(objective, Objective)
    return objective


def _passes(learner: Learner, batch: Batch) -> Iterator[Pass]:
    """Every merged request, encoded by itself; packed into one pass they cost the same."""
    for passes in (*(group.student for group in learner.plan.groups), learner.plan.teacher):
        requests: list[Request] = [*passes.images, *passes.texts]
        for request in requests:
            encoding, flops = _counted(partial(_encode_alone, learner, passes.model, request, batch))
            yield Pass(
                passes.model,
                request,
                tuple(name for name in _active(learner) if _asks(_objective(learner, name), request, passes)),
                tokens=encoding.tokens[..., 0].numel() / len(batch),
                flops=flops / len(batch),
            )


def _asks(objective: Objective, merged: Request, passes: Passes) -> bool:
    return any(passes.asked.get(request) == merged for request in objective.requests())


def _encode_alone(learner: Learner, model: str, request: Request, batch: Batch) -> ImageEncoding | TextEncoding:
    is_student = model == "student"
    images, texts = ([request], []) if isinstance(request, ImageRequest) else ([], [request])
    with torch.set_grad_enabled(is_student):
        towers = learner.student if is_student else learner.teacher
        encoding = encode(Passes(model, images, texts, {request: request}), towers, batch)[request]
    if is_student:
        encoding.tokens.sum().backward()
    return encoding


def _heads(learner: Learner, batch: Batch) -> Iterator[tuple[str, float]]:
    """By objective, operations an example of its heads and loss, forward and backward down to the encodings."""
    with torch.no_grad():
        slow = encode(learner.plan.teacher, learner.teacher, batch)
        fast = [encode(group.student, learner.student, batch) for group in learner.plan.groups]
    for group, encodings in zip(learner.plan.groups, fast, strict=True):
        encoded = slow.joined(Encoded({request: _leaf(encodings[request]) for request in encodings}))
        for name in group.objectives:
            _, flops = _counted(partial(_differentiate, _objective(learner, name), batch, encoded))
            yield name, flops / len(batch)


def _differentiate(objective: Objective, batch: Batch, encoded: Encoded) -> None:
    losses = objective(batch, encoded, At(objective.config, _CLOCK))
    torch.stack(list(losses.values())).sum().backward()


def _leaf(encoding: ImageEncoding | TextEncoding) -> ImageEncoding | TextEncoding:
    return replace(encoding, tokens=encoding.tokens.detach().requires_grad_())


def _counted(run: Callable[[], Result]) -> tuple[Result, int]:
    """What `run` gives, and the floating-point operations it made."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return result, counter.get_total_flops()


def _fullest_moments(learner: Learner, batch: Batch, dtype: torch.dtype) -> Iterator[tuple[tuple[str, ...], int]]:
    """For each group, the bytes alive at its fullest moment, weights apart, in a step as the trainer makes it."""
    learner.zero_grad(set_to_none=True)
    with _Alive([*learner.state_dict().values()]) as alive:
        batch = batch.map(torch.clone)
        groups = learner.losses_by_group(batch, _CLOCK)
        while True:
            alive.most = alive.now
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                group = next(groups, None)
            if group is None:
                return
            group.total().backward()
            yield group.objectives, alive.most


class _Alive(TorchDispatchMode):
    """Follows how many bytes of tensors are alive, those given apart.

    Attributes:
        now, most: bytes at this moment, and at the fullest since `most` was last set.
    """

    def __init__(self, apart: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
