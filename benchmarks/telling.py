"""What a benchmark found, told: JSON on the screen alone, or tables and perhaps a file; and what it cannot do."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType

from harmony.errors import UserError


def tell(found: object, tables: RenderableType, file: Path | None) -> None:
    """Print the tables, and write JSON to `file`; `-` is the screen, in place of the tables."""
    text = json.dumps(found, indent=1) + os.linesep
    if str(file) == "-":
        sys.stdout.write(text)
        return
    Console().print(tables)
    if file is not None:
        file.write_text(text)


@contextmanager
def refusals() -> Iterator[None]:
    """What the input cannot give is one sentence and exit status 2, as of the command line."""
    try:
        yield
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise SystemExit(2) from None
