"""`torchvision:` - the classification data sets of torchvision.datasets, where they already lie on disk.

    torchvision:CIFAR10?root=data&split=test
    torchvision:DTD?root=data&split=val&partition=3

`split` also serves sets that ask for `train=True` or `train=False`; whatever else a set's class takes may follow.
Nothing is ever downloaded.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision import datasets

from harmony.data.sources.base import BadExample, Example, Source, stamp_of
from harmony.errors import UserError, unknown

_OURS = ("root", "download", "transform", "target_transform", "transforms", "loader", "is_valid_file")


class TorchvisionSource(Source):
    """The examples of a data set that gives (image, class index).

    The data set's own lists of files and labels are Python objects, so each process opens it for itself; for millions
    of files use `folder:` or `shards:`.

    Args:
        place: name of a class of torchvision.datasets.
        query: `root`, `split` and arguments of that class, as text.
        uri: what it was opened from.

    Raises:
        UserError: an unknown data set, split or argument, nothing at `root`, or a data set of another kind.
    """

    def __init__(self, place: str, query: dict[str, str], uri: str) -> None:
        self.uri = uri
        if place not in datasets.__all__ or "root" not in _parameters(place):
            raise unknown("data set of torchvision", place, [name for name in datasets.__all__ if name[0].isupper()])
        self._name = place
        self._arguments = self._converted(query)
        self._set: Dataset[Any] | None = None
        opened = self._open()
        self._length = len(opened)  # type: ignore[arg-type]
        if not self._length:
            raise UserError(f"{uri} has no images in {self._arguments['root']}; correct the root")
        self._check_first(opened)
        self.class_names = _class_names(getattr(opened, "classes", None))

    def _converted(self, query: dict[str, str]) -> dict[str, Any]:
        """The arguments for the data set's class."""
        parameters = _parameters(self._name)
        given = dict(query)
        root = given.pop("root", "")
        if not root:
            raise UserError(f"{self.uri} does not say where the data is; write torchvision:{self._name}?root=FOLDER")
        if not Path(root).expanduser().is_dir():
            raise UserError(f"{self.uri} has no data: there is no folder {root}; correct the root")
        arguments: dict[str, Any] = {"root": str(Path(root).expanduser())}
        if "download" in parameters:
            arguments["download"] = False
        if "train" in parameters and "split" not in parameters:
            if given.get("split") not in ("train", "test"):
                raise UserError(
                    f"{self._name} has the splits train and test; choose one in {self.uri} with &split=test"
                )
            arguments["train"] = given.pop("split") == "train"
        elif "split" in parameters and "split" not in given:
            raise UserError(f"{self._name} has several splits; choose one in {self.uri}, as with &split=test")
        known = [name for name in parameters if name not in (*_OURS, *arguments)]
        for name, value in given.items():
            if name not in known:
                raise unknown(f"setting of torchvision:{self._name}", name, [*known, "root"])
            arguments[name] = _like(value, parameters[name].default, name)
        return arguments

    def _open(self) -> "Dataset[Any]":
        if self._set is None:
            try:
                self._set = getattr(datasets, self._name)(**self._arguments)
            except ImportError as error:
                raise UserError(
                    f"{self._name} is read with a package that is not installed ({error}); add it"
                ) from error
            except (RuntimeError, OSError, ValueError, TypeError, KeyError) as error:
                raise self._not_there(error) from error
        return self._set

    def _not_there(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and "not found" in reason:
            root = self._arguments["root"]
            return UserError(
                f"{self._name} is not in {root} as torchvision lays it out (or is damaged); put it there, as with "
                f"torchvision.datasets.{self._name}({root!r}, download=True), or correct the root"
            )
        return UserError(f"{self.uri} cannot be opened ({reason[:200]}); correct its settings")

    def _check_first(self, opened: "Dataset[Any]") -> None:
        try:
            _, label = opened[0]
        except Exception:  # a bad example, to be met and counted like others
            return
        if not _is_index(label):
            raise UserError(f"{self._name} gives no class an image, so it is no data for classification; use another")

    def __len__(self) -> int:
        return self._length

    def key(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return f"{self._name}-{i:06d}"

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        try:
            image, label = self._open()[i]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise BadExample(key, f"cannot be read: {' '.join(str(error).split())[:200]}") from error
        return Example(key, image, label=int(label))

    def has_labels(self) -> bool:
        return True

    def fingerprint(self) -> str:
        settings = {name: value for name, value in self._arguments.items() if name not in ("root", "download")}
        return f"torchvision {self._name} {sorted(settings.items())} {len(self)}"

    def stamp(self) -> str:
        # Which of the files below the root belong to it, torchvision alone knows.
        files = sorted(path for path in Path(str(self._arguments["root"])).absolute().rglob("*") if path.is_file())
        return stamp_of(files, self.uri, self.fingerprint())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_set": None}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(datasets, name).__init__).parameters)


def _like(value: str, default: Any, name: str) -> Any:
    """A text as the kind of value that a parameter has by default."""
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UserError(f"{name} must be true or false, not {value!r}")
        return value.lower() == "true"
    if isinstance(default, int):
        if not value.lstrip("-").isdigit():
            raise UserError(f"{name} must be a whole number, not {value!r}")
        return int(value)
    return value


def _is_index(label: Any) -> bool:
    return not isinstance(label, bool) and hasattr(label, "__index__") and getattr(label, "ndim", 0) == 0


def _class_names(classes: Any) -> list[str] | None:
    """The names as prompts want them: the first of several, without underscores."""
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not len(classes):
        return None
    firsts = [name[0] if isinstance(name, tuple) else name for name in classes]
    return [str(name).replace("_", " ") for name in firsts]
