"""`masks:` - images with a class for every pixel.

    masks:ADEChallengeData2016?split=validation     images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png
    masks:camvid/train.tar                          images/NAME.jpg and masks/NAME.png, in a tar or a folder
    masks:voc?images=JPEGImages&masks=SegmentationClass&classes=voc.txt

The folder of a split may stand before or behind that of the images. An image and its mask share the rest of their path
but for the ending. Class names are in `classes.json` (`{"classes": [...], "ignore_index": 255}`) in the folder or tar
or beside it, in ADE20K's `objectInfo150.txt`, or in `classes=FILE`; `classes=21` names them by number.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.decode import decoded_size
from harmony.data.sources.base import BadExample, Example, Source, spread, stamp_of, unknown_split
from harmony.data.sources.classes import Classes
from harmony.data.sources.flat import Strings
from harmony.data.sources.mask_classes import ADE_CLASSES, found_classes, given_classes, numbered
from harmony.data.sources.named_files import open_files
from harmony.data.sources.noted import Noted
from harmony.data.sources.read_mask import Coding, read_mask
from harmony.data.sources.shards import IMAGE_ENDINGS
from harmony.errors import UserError
from harmony.validation import validated

_MASK_ENDINGS = ("png", "tif", "tiff", "bmp", "gif")
_SPLITS = {"train": "training", "training": "train", "val": "validation", "validation": "val"}
_KNOWN_SPLITS = {*_SPLITS, "test", "testing", "trainval", "dev"}
_CHECKED = 4


class MaskSettings(BaseModel):
    """What a URI may say behind the question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Annotated[str | None, Field(min_length=1, description="folder of the split")] = None
    images: Annotated[str, Field(min_length=1, description="folder of the images")] = "images"
    masks: Annotated[str | None, Field(min_length=1, description="folder of the masks; masks or annotations")] = None
    classes: Annotated[str | None, Field(min_length=1, description="file with the class names, or how many")] = None
    ignore: Annotated[
        int | None,
        Field(ge=0, le=65535, description="value of pixels without class; ignore_index of classes.json or 255"),
    ] = None
    zero_is: Annotated[
        Literal["class", "ignore"] | None,
        Field(description="ignore: 0 is no class and 1 the first one, as in ADE20K, for whose folders it is usual"),
    ] = None


class MaskSource(Source):
    """Pairs of images and masks, in the order of their names; one without the other is left out and counted.

    `Example.mask` is decoded: (H, W) uint8 or uint16, `mask_ignore` where a pixel has no class.

    Args:
        place: the folder or tar, or several tars (brace ranges, wildcards).
        query: settings as text.
        uri: what it was opened from.

    Raises:
        UserError: nothing is there, no pairs, an unknown split, no class names, or the first masks are no masks.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        self.settings = validated(MaskSettings, query, "masks")
        self._files = open_files(place, uri, "folder or tar with images and masks")
        noted = Noted()
        self._mask_folder = self._find_mask_folder()
        images, masks = self._keyed(self.settings.images, IMAGE_ENDINGS), self._keyed(self._mask_folder, _MASK_ENDINGS)
        self._require_both(images, masks)
        images, masks = self._of_split(images, masks)
        keys = sorted(images.keys() & masks.keys())
        if not keys:
            names = f"{min(images, default='none')} and {min(masks, default='none')}"
            raise UserError(f"no image of {uri} has a mask: saw {names}; the names must be alike up to the ending")
        for what, ours, theirs in (("images without mask", images, masks), ("masks without image", masks, images)):
            alone = sorted(ours.keys() - theirs.keys())
            if alone:
                noted.add(f"{what} (left out)", alone[0], len(alone))
        self._keys = Strings.of(keys)
        self._images = np.array([images[key] for key in keys], dtype=np.int64)
        self._masks = np.array([masks[key] for key in keys], dtype=np.int64)
        self._set_classes()
        self._problems = [*noted.lines(), *self._files.problems]
        self._check_masks()

    def _find_mask_folder(self) -> str:
        if self.settings.masks is not None:
            return self.settings.masks
        return next((name for name in ("masks", "annotations") if self._keyed(name, _MASK_ENDINGS)), "masks")

    def _keyed(self, folder: str, endings: tuple[str, ...]) -> dict[str, int]:
        """Path without that folder and without ending -> number, of the files in that folder."""
        keyed: dict[str, int] = {}
        for number, name in enumerate(self._files.names):
            before, found, after = f"/{name}".partition(f"/{folder.strip('/')}/")
            stem, _, ending = after.rpartition(".")
            if found and ending.lower() in endings:
                keyed.setdefault(f"{before}/{stem}".removeprefix("/"), number)
        return keyed

    def _require_both(self, images: dict[str, int], masks: dict[str, int]) -> None:
        for found, option, folder in ((images, "images", self.settings.images), (masks, "masks", self._mask_folder)):
            if not found:
                tops = sorted({name.partition("/")[0] for name in self._files.names})[:8]
                raise UserError(
                    f"{self.uri} has no {option} in a folder {folder!r}: saw {', '.join(tops) or 'nothing'}; name the "
                    f"folder with ?{option}=FOLDER"
                )

    def _of_split(self, images: dict[str, int], masks: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        splits = {part for key in images for part in key.split("/")[:-1]}
        wanted = self.settings.split
        if wanted is None:
            known = sorted(splits & _KNOWN_SPLITS)
            if len(known) > 1:
                raise UserError(f"{self.uri} has the splits {', '.join(known)}; choose one with ?split={known[0]}")
            return images, masks
        split = wanted if wanted in splits else _SPLITS.get(wanted, wanted)
        if split not in splits:
            raise unknown_split(wanted, splits, self.uri)
        chosen = [
            {key: number for key, number in keyed.items() if split in key.split("/")[:-1]} for keyed in (images, masks)
        ]
        return chosen[0], chosen[1]

    def _set_classes(self) -> None:
        settings = self.settings
        is_ade = self._mask_folder == "annotations" and settings.masks is None
        classes: Classes | None
        if settings.classes is not None:
            classes = given_classes(settings.classes, self.uri)
        else:
            classes = found_classes(self._files, self.uri) or (numbered(ADE_CLASSES) if is_ade else None)
        if classes is None:
            raise UserError(
                f'{self.uri} has no class names; put {{"classes": [...], "ignore_index": 255}} into classes.json '
                "beside it, or give ?classes=FILE or ?classes=NUMBER"
            )
        ignored = classes.ignore_index if settings.ignore is None else settings.ignore
        zero_is = settings.zero_is or ("ignore" if is_ade else "class")
        self.mask_names = classes.names
        self._coding = Coding.of(len(classes.names), ignored, zero_is == "ignore")
        self.mask_ignore = self._coding.ignore

    def _check_masks(self) -> None:
        """Refuse data whose masks cannot be what the settings say, before anything runs: all of a few are wrong."""
        problems = []
        for i in spread(len(self), _CHECKED):
            try:
                self._mask(i, self.key(i))
            except BadExample as bad:
                problems.append(bad)
            else:
                return
        first = problems[0]
        raise UserError(
            f"the masks of {self.uri} do not fit its {len(self.mask_names or [])} classes: {first.key} {first.reason}"
        )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        image, mask = self._files.read(int(self._images[i]), key), self._mask(i, key)
        size = decoded_size(image)
        if size is not None and size != mask.shape[::-1]:
            raise BadExample(
                key,
                f"is {size[0]} x {size[1]} px, but its mask is {mask.shape[1]} x {mask.shape[0]} px; make them equal",
            )
        return Example(key, image, mask=mask)

    def _mask(self, i: int, key: str) -> NDArray[np.uint8] | NDArray[np.uint16]:
        number = int(self._masks[i])
        return read_mask(self._files.read(number, key), self._coding, key, self._files.names[number])

    def fingerprint(self) -> str:
        return f"masks {len(self)} {self._coding.said} {self._files.digest(self._numbers())}"

    def stamp(self) -> str:
        return stamp_of(self._files.files(self._numbers()), self.uri, self.fingerprint())

    def _numbers(self) -> NDArray[np.int64]:
        """Of all files that examples are made of."""
        return np.concatenate([self._images, self._masks])

    def problems(self) -> list[str]:
        return list(self._problems)
