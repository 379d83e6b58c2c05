"""What a person sees while work is going on: progress bars and notes on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Tick = Callable[..., None]
"""Called with steps done, steps in total and, optionally, a line about the state."""

_LINE_EVERY_S = 20.0


class Reporter:
    """Writes notes and progress to stderr: bars on a terminal, a line now and then elsewhere.

    Args:
        quiet: Write nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One line of text."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Tick]:
        """A bar for one long piece of work; its length is known from the first call on."""
        if self._quiet:
            yield lambda *_: None
        elif self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=None, state="")

                def advance(done: int, total: int, state: str = "") -> None:
                    bar.update(task, completed=done, total=total, state=state)

                yield advance
        else:
            yield self._lines(title)

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[state]}"), console=self.console)

    def _lines(self, title: str) -> Tick:
        last = time.monotonic()

        def advance(done: int, total: int, state: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _LINE_EVERY_S or (done == total and now - last > 1):
                last = now
                self.note(f"  {title}: {done}/{total} {state}".rstrip())

        return advance
