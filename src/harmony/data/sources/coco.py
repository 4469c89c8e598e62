"""`coco:` - images with things (boxes, masks), captions or both, as COCO's json files list them.

    coco:annotations/instances_val2017.json?images=val2017
    coco:instances.json?images=images.tar&captions=captions.json
    coco:captions_val2017.json?images=val2017

Images are looked for in `images`, a folder or a tar, or else beside the file.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.decode import decoded_size
from harmony.data.sources import coco_file
from harmony.data.sources.base import BadExample, Example, Objects, Source, stamp_of
from harmony.data.sources.coco_outlines import drawn
from harmony.data.sources.named_files import beside, open_files
from harmony.data.sources.noted import Noted
from harmony.errors import UserError
from harmony.validation import validated


class CocoSettings(BaseModel):
    """What a URI may say behind the question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Annotated[str | None, Field(min_length=1, description="folder or tar of the images; the file's own")] = None
    captions: Annotated[
        str | None, Field(min_length=1, description="captions file of the same images, beside an instances file")
    ] = None


class CocoSource(Source):
    """The images of a COCO file that are there, in the file's order; those without annotations too.

    `Example.objects` has boxes clipped to the image. An image whose size is not what the file says is a bad example:
    its boxes would lie elsewhere.

    Args:
        place: the json file.
        query: settings as text.
        uri: what it was opened from.

    Raises:
        UserError: no such file, no COCO file, or none of its images is there.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        settings = validated(CocoSettings, query, "coco")
        self._path = Path(place).expanduser()
        content = coco_file.load(self._path, uri)
        noted = Noted()
        images = coco_file.images_of(content, self._path, noted)
        self._files = open_files(beside(settings.images, self._path) if settings.images else self._path.parent, uri)
        numbers = self._files.find(images.names)
        kept = numbers >= 0
        self._require_images(images.names, kept, noted)
        self._fill_sizes(images, numbers)
        self._numbers = numbers[kept]
        self._ids, self._sizes = images.ids[kept], images.sizes[kept]
        self._things: coco_file.Things | None = None
        captions = content if coco_file.holds_captions(content) else None
        if captions is None:
            categories = coco_file.categories_of(content, self._path)
            labels = {number: label for label, number in enumerate(categories)}
            self._things = coco_file.things_of(content, images, kept, labels, noted)
            self.object_names = list(categories.values())
            self.has_object_masks = self._things.outlines.any
        if settings.captions:
            captions = self._beside_things(Path(beside(settings.captions, self._path)), images)
        self._captions = coco_file.captions_of(captions, images, kept, noted) if captions else None
        self._problems = [*noted.lines(), *self._files.problems]

    def _require_images(self, names: list[str], kept: np.ndarray, noted: Noted) -> None:
        absent = np.flatnonzero(~kept)
        if len(absent) == len(names):
            raise UserError(
                f"none of the {len(names):,} images of {self.uri} is in {self._files.place}: looked for {names[0]}; "
                "say where they are with ?images=FOLDER or ?images=FILE.tar"
            )
        if len(absent):
            noted.add("images that are not there (left out)", names[int(absent[0])], len(absent))

    def _fill_sizes(self, images: coco_file.Listed, numbers: np.ndarray) -> None:
        """Read the sizes that the file does not give from the images' headers."""
        for place in np.flatnonzero((images.sizes == 0).any(1) & (numbers >= 0)):
            with contextlib.suppress(BadExample):
                images.sizes[place] = decoded_size(self._files.read(int(numbers[place]), "")) or (0, 0)

    def _beside_things(self, path: Path, images: coco_file.Listed) -> dict[str, object]:
        """The content of the captions file; its ids must mean the same images."""
        if self._things is None:
            raise UserError(f"{self.uri} names two files of captions; leave out one of them")
        content = coco_file.load(path, self.uri)
        if not coco_file.holds_captions(content):
            raise UserError(f"{path} holds no captions; name a captions file of the same images")
        ours = dict(zip(images.ids.tolist(), images.names, strict=True))
        for image in content["images"]:
            name = ours.get(image.get("id"))
            if name is not None and image.get("file_name", name) != name:
                raise UserError(
                    f"image {image['id']} is {name} in {self._path.name} and {image['file_name']} in {path.name}; name "
                    "two files of the same images"
                )
        return content

    def __len__(self) -> int:
        return len(self._numbers)

    def key(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return self._files.names[int(self._numbers[i])]

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        image = self._files.read(int(self._numbers[i]), key)
        return Example(key, image, self._captions_of(i), objects=self._objects(i, key, image))

    def _captions_of(self, i: int) -> list[str]:
        if self._captions is None:
            return []
        captions, ends = self._captions
        return captions[int(ends[i - 1]) if i else 0 : int(ends[i])]

    def _objects(self, i: int, key: str, image: bytes) -> Objects | None:
        if self._things is None:
            return None
        things, rows = self._things, slice(int(self._things.ends[i - 1]) if i else 0, int(self._things.ends[i]))
        width, height = self._size(i, key, image)
        boxes = things.boxes[rows]
        masks = None
        if self.has_object_masks:
            outlines = [things.outlines[row] for row in range(rows.start, rows.stop)]
            masks = partial(drawn, outlines, boxes, width, height)
        return Objects(
            boxes, things.labels[rows], things.crowd[rows], things.areas[rows], masks, image_id=int(self._ids[i])
        )

    def _size(self, i: int, key: str, image: bytes) -> tuple[int, int]:
        """Width and height of the image as decoded."""
        listed = (int(self._sizes[i, 0]), int(self._sizes[i, 1]))
        # An image that is damaged has no size of its own, and is met where it is decoded.
        decoded = decoded_size(image) or listed
        if all(listed) and decoded != listed:
            raise BadExample(
                key, f"is {decoded[0]} x {decoded[1]} px, but its annotations are for {listed[0]} x {listed[1]} px"
            )
        return decoded

    def has_captions(self) -> bool:
        return self._captions is not None and len(self._captions[0]) > 0

    def caption_place(self) -> str:
        return "the annotations of the file" if self._captions is None else "the captions file"

    def fingerprint(self) -> str:
        things = 0 if self._things is None else len(self._things.labels)
        captions = 0 if self._captions is None else len(self._captions[0])
        return f"coco {self._path.name} {len(self)} {things} {captions} {self._files.digest(self._numbers)}"

    def stamp(self) -> str:
        return stamp_of([self._path.absolute(), *self._files.files(self._numbers)], self.uri, self.fingerprint())

    def problems(self) -> list[str]:
        return list(self._problems)
