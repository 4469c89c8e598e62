"""The few pieces of HTML the report is made of; everything that comes from outside is escaped here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


class Html(str):
    """Text that is HTML already; anything else is escaped when it becomes part of a page."""

    __slots__ = ()


def text(value: object) -> Html:
    """The value as HTML: itself when it is HTML, else escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. `class_` stands for class, and an underscore in a name for a hyphen."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "line", "rect", "path", "circle", "polyline") and not content:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """The parts one after the other."""
    return Html(between.join(text(part) for part in parts))


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: its anchor, one word.
        title: its heading.
        body: its content.
        lead: what one sees here, in a sentence or two; may be empty.
    """

    name: str
    title: str
    body: Html
    lead: str = ""

    def html(self) -> Html:
        lead = tag("p", self.lead, class_="lead") if self.lead else ""
        return tag("section", tag("h2", self.title), lead, self.body, id=self.name)


def note(message: str | Html) -> Html:
    """A sentence in place of something that cannot be shown."""
    return tag("p", message, class_="note")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], words: Sequence[int] = ()) -> Html:
    """A table whose first column, and those in `words`, are text, and whose others are numbers."""
    kinds = ["words" if column in words else None for column in range(len(head))]
    top = tag("tr", *(tag("th", cell, class_=kind) for cell, kind in zip(head, kinds, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), class_="table")


def folded(title: str, content: object) -> Html:
    """Something that opens when asked for."""
    return tag("details", tag("summary", title), content)


def picture(source: str, alt: str, class_: str | None = None, title: str | None = None) -> Html:
    """An image from a data URI."""
    return tag("img", src=source, alt=alt, class_=class_, title=title, loading="lazy")


def row_of(*shown: tuple[object, str]) -> Html:
    """Pictures side by side, each with a word below it."""
    return tag("div", *(tag("figure", image, tag("figcaption", says), class_="tile") for image, says in shown))


def percent(share: float) -> str:
    """A share as people read it: 84.3 %, 0.25 %."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 0.95 else f"{value:.2g} %"


def operations(count: float) -> str:
    """A number of floating-point operations: 3.26 GFLOP."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:,.0f} FLOP"


def number(value: float) -> str:
    """A number in few characters: 12,345; 3.142; 0.00042."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.01:
        return f"{value:.4g}"
    return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
