"""`flickr:` - Flickr8k, Flickr30k and COCO as their caption files list them.

    flickr:Flickr8k.token.txt?images=Flicker8k_Dataset&names=Flickr_8k.testImages.txt
    flickr:dataset_flickr30k.json?images=flickr30k-images&split=test
    flickr:captions.txt?images=Images

The file's form is found out, see `harmony.data.sources.flickr_files`. Images are looked for in `images`, a folder or a
tar, or else beside the file.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from harmony.data.sources.base import Example, Source, stamp_of, unknown_split
from harmony.data.sources.flat import Strings
from harmony.data.sources.flickr_files import Captioned, read_captions
from harmony.data.sources.named_files import beside, open_files
from harmony.data.sources.noted import Noted
from harmony.data.sources.places import nothing_there
from harmony.errors import UserError
from harmony.validation import validated

_USUAL = ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images")


class FlickrSettings(BaseModel):
    """What a URI may say behind the question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: Annotated[str | None, Field(min_length=1, description="folder or tar of the images; beside the file")] = (
        None
    )
    split: Annotated[
        str | None,
        Field(min_length=1, description="split in a json file (train, val, test), or several: train,restval"),
    ] = None
    names: Annotated[
        str | None, Field(min_length=1, description="text file with the names of the images wanted, one a line")
    ] = None


class FlickrSource(Source):
    """The images that a caption file names and that are there, in the file's order, each with all its captions.

    Args:
        place: the caption file.
        query: settings as text.
        uri: what it was opened from.

    Raises:
        UserError: no such file or split, a file of another form, or none of its images is there.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        self.settings = validated(FlickrSettings, query, "flickr")
        self._path = Path(place).expanduser()
        if not place or not self._path.is_file():
            raise nothing_there(uri, "file", place)
        noted = Noted()
        listed = self._wanted(read_captions(self._path, noted), noted)
        self._files = open_files(self._images_place(), uri)
        numbers = self._files.find(image.name for image in listed)
        absent = np.flatnonzero(numbers < 0)
        if len(absent) == len(listed):
            raise UserError(
                f"none of the {len(listed):,} images of {uri} is in {self._files.place}: looked for {listed[0].name}; "
                "say where they are with ?images=FOLDER or ?images=FILE.tar"
            )
        if len(absent):
            noted.add("images that are not there (left out)", listed[int(absent[0])].name, len(absent))
        kept = [image for image, number in zip(listed, numbers, strict=True) if number >= 0]
        self._numbers = numbers[numbers >= 0]
        self._captions = Strings.of([caption for image in kept for caption in image.captions])
        self._ends = np.cumsum([len(image.captions) for image in kept], dtype=np.int64)
        self._problems = [*noted.lines(), *self._files.problems]

    def _wanted(self, images: list[Captioned], noted: Noted) -> list[Captioned]:
        """The images of the split, or of the list of names."""
        if self.settings.split is not None:
            splits = {image.split for image in images if image.split}
            if not splits:
                raise UserError(
                    f"{self._path} has no splits; leave out split=, or give ?names=FILE with the names of the images"
                )
            wanted = self.settings.split.split(",")
            for split in wanted:
                if split not in splits:
                    raise unknown_split(split, splits, self.uri)
            images = [image for image in images if image.split in wanted]
        if self.settings.names is not None:
            images = self._named(images, noted)
        if not images:
            raise UserError(f"{self.uri} has no image with a caption; check the file")
        return images

    def _named(self, images: list[Captioned], noted: Noted) -> list[Captioned]:
        path = Path(beside(self.settings.names or "", self._path))
        if not path.is_file():
            raise UserError(f"{self.uri}: the list of names {path} is not there; correct names=")
        names = {line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()} - {""}
        chosen, met = [], set()
        for image in images:
            alike = {image.name, image.name.rpartition("/")[2], image.name.rpartition(".")[0]} & names
            if alike:
                chosen.append(image)
                met |= alike
        if not chosen:
            raise UserError(f"{path} names none of the images of {self._path}; give names as they stand there")
        if names - met:
            noted.add(f"names in {path.name} without captions (left out)", min(names - met), len(names - met))
        return chosen

    def _images_place(self) -> str | Path:
        if self.settings.images is not None:
            return beside(self.settings.images, self._path)
        usual = (self._path.parent / name for name in _USUAL)
        return next((folder for folder in usual if folder.is_dir()), self._path.parent)

    def __len__(self) -> int:
        return len(self._numbers)

    def key(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return self._files.names[int(self._numbers[i])]

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        captions = self._captions[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])]
        return Example(key, self._files.read(int(self._numbers[i]), key), captions)

    def has_captions(self) -> bool:
        return True

    def caption_fields(self) -> list[str]:
        return ["captions"]

    def fingerprint(self) -> str:
        return f"flickr {self._path.name} {len(self)} {len(self._captions)} {self._files.digest(self._numbers)}"

    def stamp(self) -> str:
        return stamp_of([self._path.absolute(), *self._files.files(self._numbers)], self.uri, self.fingerprint())

    def problems(self) -> list[str]:
        return list(self._problems)
