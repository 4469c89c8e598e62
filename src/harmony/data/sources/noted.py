"""What is wrong with data, counted by kind."""


class Noted:
    """Counts of what is wrong, each with the first case, to be shown by `Source.problems`."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, which: str = "", count: int = 1) -> None:
        """Count `what`, as in "boxes without area (left out)", of which `which` is a case."""
        self._counts[what] = self._counts.get(what, 0) + count
        self._first.setdefault(what, which)

    def lines(self) -> list[str]:
        return [
            f"{what}: {count:,}" + (f", as {self._first[what]}" if self._first[what] else "")
            for what, count in self._counts.items()
        ]
