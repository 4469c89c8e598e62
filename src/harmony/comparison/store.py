"""The directory of a comparison: what lies where, and that it is gone on with only by the command that began it.

OUT/
    plan.json                        everything results depend on
    runs/ROW/seed-0/                 a run, as `harmony train` leaves it, and measured.json
    runs/untrained/seed-0/           the model before training: measured.json alone
    features/                        while something is measured
    compare.json, compare.md, compare.html
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmony import ranks
from harmony.comparison.plan import Plan
from harmony.errors import UserError
from harmony.evaluation.results import Metrics, write_json
from harmony.training.checkpoints import version_of
from harmony.training.distributed import everyones, together
from harmony.training.run_directory import RunDirectory, locked


@dataclass
class Measured:
    """What is known of one run.

    Attributes:
        curve: metrics by task, by step.
        failed: why training could not go on, if it could not.
        software: versions of the packages that trained and measured it.
    """

    curve: dict[int, Metrics] = field(default_factory=dict)
    failed: str | None = None
    software: Mapping[str, str] = field(default_factory=dict)


def installed() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {package: version_of(package) for package in ("harmony", "torch", "timm")}


class Folder:
    """The directory of a comparison."""

    def __init__(self, out: Path) -> None:
        self.path = out

    @property
    def page(self) -> Path:
        return self.path / "compare.html"

    @property
    def features(self) -> Path:
        return self.path / "features"

    def run(self, row: str, seed: int) -> Path:
        """Directory of a run. `row` is the row's name as a directory's."""
        return self.path / "runs" / row / f"seed-{seed}"

    def read(self, run: Path) -> Measured:
        """What is known of a run; all ranks are told what the first one reads."""
        with together():
            found = _read(run / "measured.json") if ranks.is_main() else Measured()
        told: Measured = everyones(found)[0]
        return told

    def write(self, run: Path, measured: Measured) -> None:
        if ranks.is_main():
            curve = {str(step): metrics for step, metrics in sorted(measured.curve.items())}
            known = {"failed": measured.failed, "software": dict(measured.software), "curve": curve}
            write_json(run / "measured.json", known)

    def forget_features(self) -> None:
        """Remove the features of what has been measured. All ranks have to call it."""
        with together():
            pass  # the others may still be reading
        with together():
            if ranks.is_main():
                shutil.rmtree(self.features, ignore_errors=True)

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[bool]:
        """Make the directory, or take it up again, and keep other processes out of it; gives whether it is new.

        A new one is removed again when a UserError leaves the block before anything is trained.

        Raises:
            UserError: it holds something else, or a comparison with other settings.
        """
        terms = json.loads(json.dumps(dict(plan.terms())))
        with ExitStack() as stack:
            with together():
                fresh: bool = everyones(self._check(terms) if ranks.is_main() else None)[0]
            with together():
                if ranks.is_main():
                    stack.enter_context(self._held(terms, fresh))
            yield fresh

    @contextmanager
    def _held(self, terms: dict[str, Any], fresh: bool) -> Iterator[None]:
        there = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made ({error.strerror}); choose another --out") from None
        try:
            with locked(RunDirectory(self.path)):
                write_json(self.path / "plan.json", terms)
                yield
        except UserError:
            if fresh and not any((self.path / "runs").glob("*/*/recipe.yaml")):
                self._clear(there)
            raise

    def _check(self, terms: dict[str, Any]) -> bool:
        """Whether there is nothing yet; UserError when what is there is no comparison, or another one."""
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        held = sorted(path.name for path in self.path.iterdir() if path.name != ".lock")
        if not held:
            return True
        if "plan.json" not in held:
            raise UserError(f"{self.path} holds something else ({held[0]}); choose another --out")
        try:
            before = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{self.path / 'plan.json'} cannot be read; choose another --out") from None
        if not (isinstance(before, dict) and isinstance(before.get("--seeds"), list)):
            raise UserError(f"{self.path / 'plan.json'} is no plan of a comparison; choose another --out")
        for name in dict.fromkeys([*before, *terms]):
            was, now = before.get(name, "not there"), terms.get(name, "not there")
            if was != now and not (name == "--seeds" and set(was) <= set(now)):  # more of them change no run there is
                raise UserError(
                    f"{self.path} holds a comparison in which {name} was {_short(was)}, and now it is {_short(now)}; "
                    "put this back to go on with it, or choose another --out"
                )
        return False

    def _clear(self, there: bool) -> None:
        for name in ("plan.json", "runs", "features"):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not there:
            self.path.rmdir()


def _read(path: Path) -> Measured:
    if not path.is_file():
        return Measured()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        curve = {int(step): metrics for step, metrics in values["curve"].items()}
        return Measured(curve, values["failed"], values.get("software", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; remove it, and its run is measured again") from None


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
