"""Progress of long commands: rich's bar on a terminal that has it, else ten lines."""

from __future__ import annotations

import sys
from typing import Any

LINES = 10


class Progress:
    """A context manager. `total` in any unit: steps, seconds."""

    def __init__(self, total: float):
        self._total, self._bar, self._lines = total, None, 0
        self._task: Any = None
        try:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        if sys.stdout.isatty() and total:
            self._bar = Progress(BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, text: str) -> None:
        """What is done, in the unit of `total`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total), description=text)
        elif self._total and done * LINES >= self._total * (self._lines + 1):
            self._lines = int(done * LINES / self._total)
            print(f"        {text}", flush=True)

    def print(self, text: str) -> None:
        """Something to keep, above the bar."""
        if self._bar is not None:
            self._bar.console.out(text)
        else:
            print(text, flush=True)
