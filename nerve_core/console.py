"""What commands print: every text as it is, never as markup, and never as a command to the terminal."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_WIDTH = 80  # where the terminal's is not known, as rich takes it
_KEPT = "\n\t\u200c\u200d"  # the joiners belong to words of some languages, and to emoji


def printable(text: str) -> str:
    r"""`text` without anything that moves a terminal's cursor or turns the direction of writing: control characters,
    formatting characters and undecodable bytes are escaped as Python does it, ESC as \x1b. Line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _UNPRINTABLE and letter not in _KEPT
        else letter
        for letter in text
    )


class PlainStatus(Status):
    """What is being done at the moment, as text."""

    def __init__(self, status: str, *, console: Console) -> None:
        super().__init__(Text(status), console=console)

    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        """Say something else."""
        super().update(Text(status) if isinstance(status, str) else status, **options)


class PlainConsole(Console):
    """A rich console that takes text as text: no markup, no emoji codes, no highlighting, no control characters.

    `style` and Text objects still colour what is printed; what is in them is made printable too.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        # In a width of 0, as terminals of some containers have it, rich prints nothing at all.
        width = _WIDTH if os.environ.get("COLUMNS", "").strip() == "0" else None
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)

    def status(self, status: RenderableType, **options: Any) -> PlainStatus:
        """A line with a spinner that is shown meanwhile."""
        return PlainStatus(str(status), console=self, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text that is printable before its width is measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What goes to the terminal: printable, unless it is rich's own control sequence."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console = PlainConsole(stderr=True)
"""What is said about the work; the result of a command goes to standard output."""


def say(text: str, style: str | None = None) -> None:
    """Print a sentence to standard error; a path in it is not broken."""
    console.print(text, style=style, soft_wrap=True)


def tell(text: object) -> None:
    """Print a line of a command's result to standard output."""
    print(printable(str(text)))
