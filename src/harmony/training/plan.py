"""The plan: what all objectives request, merged into the fewest encoder passes.

Equal requests are encoded once, and requests that differ only in crops or in what they read of the output (layers,
attention, the class token alone) are one pass over the union. Passes of one image tower that belong to the same group
run packed, as one. Objectives that share a pass of the student form a group; groups run one after the other, each freed
by its backward pass before the next begins, unless the plan is joint, in which case there is one group. The teacher's
passes and those of frozen models run once for all groups, without gradients and before them, and masks that the teacher
guides are drawn in between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harmony.data.batch import Batch
from harmony.data.masks import MaskSampler, PatchSampler
from harmony.data.views import ViewConfig
from harmony.errors import UserError, unknown
from harmony.models.encodings import ImageEncoding, TextEncoding
from harmony.models.frozen import FrozenModel
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower, Segment
from harmony.objectives.base import Encoded, GuidedMask, ImageRequest, Objective, Request, TextRequest

AnyMask = MaskSampler | GuidedMask
Encodings = dict[Request, ImageEncoding | TextEncoding]


@dataclass
class Passes:
    """What one model encodes at one time.

    Attributes:
        model: "student", "teacher" or the name of a frozen model.
        images: merged image requests; together they are one packed pass.
        texts: merged text requests, one pass each.
        asked: every original request with the merged one that covers it.
    """

    model: str
    images: list[ImageRequest] = field(default_factory=list)
    texts: list[TextRequest] = field(default_factory=list)
    asked: dict[Request, Request] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.asked)


@dataclass
class Group:
    """Objectives tied together by the student's passes they share."""

    objectives: tuple[str, ...]
    student: Passes


class Plan:
    """Passes and groups for a set of objectives.

    Attributes:
        views: names of the views that are encoded.
        teacher: the teacher's passes, shared by all groups.
        frozen: those of each frozen model, likewise.
        groups: those that encode most pixels first, while fewest gradients lie in memory; else in the recipe's order.
        guided: masks that are drawn from the teacher's encodings, by name; those that some objective uses.
        asked: by objective, its requests and those of the guided masks it uses.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        views: Mapping[str, ViewConfig],
        masks: Mapping[str, MaskSampler],
        has_text: bool,
        joint: bool = False,
        frozen: Mapping[str, ImageTower] | None = None,
        guided: Mapping[str, GuidedMask] | None = None,
    ) -> None:
        frozen = frozen or {}
        requests = {name: list(objective.requests()) for name, objective in objectives.items()}
        known: dict[str, AnyMask] = {**masks, **(guided or {})}
        for name, wanted in requests.items():
            for request in wanted:
                _check_model(name, request, views, frozen)
                _check(name, request, views, known, has_text)
        self.guided: dict[str, GuidedMask] = {}
        for wanted in requests.values():
            names = {name for request in wanted for name in _masks(request)}
            used = {name: mask for name, mask in (guided or {}).items() if name in names}
            wanted += [mask.request for mask in used.values() if mask.request not in wanted]
            self.guided |= used
        self.asked = requests
        every = [request for wanted in requests.values() for request in wanted]
        self.views = {request.view for request in every if isinstance(request, ImageRequest)}
        self.teacher = _merge("teacher", every, views)
        self.frozen = [passes for model in frozen if (passes := _merge(model, every, views))]
        groups = [
            Group(names, _merge("student", [r for name in names for r in requests[name]], views))
            for names in _tie(requests, joint)
        ]
        self.groups = sorted(groups, key=lambda group: _pixels(group.student, views), reverse=True)

    def with_guided(self, batch: Batch, teacher: Encoded) -> Batch:
        """The batch with the masks that the teacher's encodings guide."""
        drawn = {name: mask.draw(teacher.image(mask.request)) for name, mask in self.guided.items()}
        return replace(batch, masks=batch.masks | drawn) if drawn else batch


def encode(passes: Passes, towers: Towers | FrozenModel, batch: Batch) -> Encoded:
    """Run the passes and sort the encodings by the requests that asked for them."""
    done: Encodings = {}
    if passes.images:
        segments = [_segment(request, batch) for request in passes.images]
        for request, encoding in zip(passes.images, towers.image.encode_packed(segments), strict=True):
            done[request] = _by_crop(encoding, len(batch))
    for text in passes.texts:
        assert towers.text is not None
        hidden = batch.masks[text.replace].masked if text.replace else None
        done[text] = towers.text.read(batch.captions[text.stream], hidden, text.attention, text.pooled)
    return Encoded({asked: _part(asked, merged, done[merged]) for asked, merged in passes.asked.items()})


def _segment(request: ImageRequest, batch: Batch) -> Segment:
    """The crops, masks and streams of one merged request; crops and examples become one dimension, crops outermost."""
    assert request.crops is not None
    crops = list(request.crops)
    streams = [f"{request.view}/{crop}/{request.replace}/{request.keep}" for crop in crops]
    kept = batch.masks[request.keep].kept if request.keep else None
    return Segment(
        pixels=_pick(batch.images[request.view], crops).flatten(0, 1),
        replace=_pick(batch.masks[request.replace].masked, crops).flatten(0, 1) if request.replace else None,
        keep=_pick(kept, crops).flatten(0, 1) if kept is not None else None,
        layers=request.layers,
        attention=request.attention,
        pooled=request.pooled,
        chance=batch.chance.branches(streams),
    )


def _pick(tensor: Tensor, crops: list[int]) -> Tensor:
    """The given crops of a (V, ...) tensor; a part of it, not a copy, when they follow each other."""
    if crops == list(range(crops[0], crops[0] + len(crops))):
        return tensor[crops[0] : crops[0] + len(crops)]
    return torch.stack([tensor[crop] for crop in crops])


def _by_crop(encoding: ImageEncoding, images: int) -> ImageEncoding:
    """(V * B, ...) -> (V, B, ...)."""
    return encoding.map(lambda tensor: tensor.unflatten(0, (-1, images)))


def _part(asked: Request, merged: Request, encoding: ImageEncoding | TextEncoding) -> ImageEncoding | TextEncoding:
    """The crops that one request wanted from the pass that covers it."""
    if not isinstance(encoding, ImageEncoding) or not isinstance(asked, ImageRequest) or asked.crops is None:
        return encoding
    assert isinstance(merged, ImageRequest) and merged.crops is not None
    if asked.crops == merged.crops:
        return encoding
    places = [merged.crops.index(crop) for crop in asked.crops]
    return encoding.map(lambda tensor: _pick(tensor, places))


def _merge(model: str, requests: Sequence[Request], views: Mapping[str, ViewConfig]) -> Passes:
    """Requests of one model that differ only in what they want of the same pass become one over the union."""
    passes = Passes(model)
    readings: dict[TextRequest, list[TextRequest]] = {}
    families: dict[ImageRequest, list[ImageRequest]] = {}
    for request in requests:
        if request.model != model:
            continue
        if isinstance(request, TextRequest):
            readings.setdefault(replace(request, pooled=False), []).append(request)
        else:
            families.setdefault(_family_of(request), []).append(request)
    for reading, readers in readings.items():
        whole = replace(reading, pooled=all(reader.pooled for reader in readers))
        passes.texts.append(whole)
        passes.asked |= dict.fromkeys(readers, whole)
    for family, members in families.items():
        crops = sorted({crop for member in members for crop in _crops(member, views)})
        layers = sorted({layer for member in members for layer in member.layers})
        attention = any(member.attention for member in members)
        pooled = all(member.pooled for member in members)
        merged = replace(family, crops=tuple(crops), layers=tuple(layers), attention=attention, pooled=pooled)
        passes.images.append(merged)
        passes.asked |= dict.fromkeys(members, merged)
    return passes


def _crops(request: ImageRequest, views: Mapping[str, ViewConfig]) -> tuple[int, ...]:
    return tuple(range(views[request.view].count)) if request.crops is None else request.crops


def _pixels(passes: Passes, views: Mapping[str, ViewConfig]) -> int:
    """Of one example, an upper bound: patches that are left out count too."""
    return sum(len(_crops(request, views)) * views[request.view].size ** 2 for request in passes.images)


def _tie(requests: Mapping[str, Sequence[Request]], joint: bool) -> list[tuple[str, ...]]:
    """Names of objectives that share a pass of the student, transitively."""
    groups: list[tuple[set[str], set[Request]]] = []
    for name, wanted in requests.items():
        passes = {_family(request) for request in wanted if request.model == "student"}
        tied = [group for group in groups if joint or group[1] & passes]
        names = {name}.union(*(group[0] for group in tied))
        shared = passes.union(*(group[1] for group in tied))
        first = groups.index(tied[0]) if tied else len(groups)
        groups = [group for group in groups if group not in tied]
        groups.insert(first, (names, shared))
    return [tuple(name for name in requests if name in names) for names, _ in groups]


def _family(request: Request) -> Request:
    return _family_of(request) if isinstance(request, ImageRequest) else replace(request, pooled=False)


def _family_of(request: ImageRequest) -> ImageRequest:
    return replace(request, crops=None, layers=(), attention=False, pooled=False)


def _masks(request: Request) -> tuple[str, ...]:
    """Names of the masks that a request uses."""
    names = (request.replace, request.keep) if isinstance(request, ImageRequest) else (request.replace,)
    return tuple(name for name in names if name is not None)


def _check_model(
    name: str, request: Request, views: Mapping[str, ViewConfig], frozen: Mapping[str, ImageTower]
) -> None:
    """Refuse a model that there is not, and what a frozen one cannot do."""
    if request.model not in ("student", "teacher", *frozen):
        raise unknown(f"model in objective {name}:", request.model, ("student", "teacher", *frozen))
    if request.model not in frozen:
        return
    if isinstance(request, TextRequest):
        raise UserError(
            f"objective {name} has captions read by {request.model!r}, but a frozen model sees images alone"
        )
    if request.replace is not None or request.keep is not None:
        raise UserError(f"objective {name} hides patches from {request.model!r}, but a frozen model sees images whole")
    size, patch = (views[request.view].size, frozen[request.model].patch) if request.view in views else (0, 1)
    if size % patch:
        raise UserError(
            f"objective {name} shows views of {size} px to {request.model!r}, whose patches are {patch} px wide; set "
            f"views.{request.view}.size to a multiple of {patch}"
        )


def _check(
    name: str,
    request: Request,
    views: Mapping[str, ViewConfig],
    masks: Mapping[str, AnyMask],
    has_text: bool,
) -> None:
    """Refuse what cannot be encoded, with the fix in the message."""
    if isinstance(request, TextRequest):
        if not has_text:
            raise UserError(f"objective {name} reads captions, but model.text is null; give the text tower's sizes")
        for mask in _masks(request):
            _check_mask(name, mask, masks)
        return
    if request.view not in views:
        raise unknown(f"view in objective {name}:", request.view, views)
    count = views[request.view].count
    if request.crops is not None and max(request.crops) >= count:
        raise UserError(
            f"objective {name} needs crop {max(request.crops) + 1} of view {request.view!r}, which has {count}; "
            f"set views.{request.view}.count={max(request.crops) + 1} or more"
        )
    for mask in _masks(request):
        _check_mask(name, mask, masks, request.view)
        sampler = masks[mask]
        if mask == request.keep and isinstance(sampler, PatchSampler) and not sampler.equal_counts:
            raise UserError(
                f"objective {name} leaves out the patches of the mask {mask!r}, which are not equally many in every "
                "crop; name a mask whose are, such as that of mae"
            )
        if request.model == "teacher" and isinstance(masks[mask], GuidedMask):
            raise UserError(
                f"objective {name} hides patches from the teacher by the mask {mask!r}, which is drawn from what the "
                "teacher sees; use it on the student"
            )


def _check_mask(name: str, mask: str, masks: Mapping[str, AnyMask], view: str | None = None) -> None:
    if mask not in masks:
        raise UserError(
            f"objective {name} uses the mask {mask!r}, which no objective of this recipe draws "
            f"(drawn: {', '.join(masks) or 'none'}); switch an objective off by weight=0 instead of null "
            "and it goes on drawing its masks"
        )
    if view is not None and masks[mask].view != view:
        raise UserError(
            f"objective {name} uses the mask {mask!r} on view {view!r}, but it is drawn on {masks[mask].view!r}"
        )
