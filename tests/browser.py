"""A page as a browser sees it: opened in headless Chromium where there is one, else only parsed."""

import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

CHROMIUM = next((found for found in map(shutil.which, _NAMES) if found), None)
"""Path of the browser, or None."""

_VOID = ("meta", "img", "br", "hr", "link", "input", "base")
"""Elements that have no end."""


@dataclass
class Seen(HTMLParser):
    """Elements of a page: (name, attributes) of each, its headings and visible text, and what is wrong with it."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    text: str = ""
    errors: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(convert_charrefs=True)
        self._open = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"</{tag}> ends what is not open")

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside == "h2":
            self.headings.append(data)
        if inside not in ("script", "style"):
            self.text += data

    def named(self, *names):
        return [attributes for name, attributes in self.elements if name in names]

    def of_class(self, name):
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]


def parsed(html: str) -> Seen:
    seen = Seen()
    seen.feed(html)
    seen.close()
    seen.errors += [f"<{tag}> is not closed" for tag in seen._open]
    return seen


def opened(page: Path, folder: Path) -> Seen:
    """The page after its script has run; `errors` holds the messages of the console."""
    if CHROMIUM is None:
        warnings.warn("chromium is not installed: the page was parsed, not opened", stacklevel=2)
        return parsed(page.read_text(encoding="utf-8"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = parsed(done.stdout)
    seen.errors = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return seen
