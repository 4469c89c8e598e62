"""What a benchmark found, told: JSON on the screen alone, or tables and perhaps a file."""

import json
import os
import sys
from pathlib import Path

from rich.console import Console, RenderableType


def tell(found: object, tables: RenderableType, file: Path | None) -> None:
    """Print the tables, and write JSON to `file`; `-` is the screen, in place of the tables."""
    text = json.dumps(found, indent=1) + os.linesep
    if str(file) == "-":
        sys.stdout.write(text)
        return
    Console().print(tables)
    if file is not None:
        file.write_text(text)
