"""What a person sees while work goes on: a live bar on a terminal, plain lines elsewhere, nothing when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Says things and follows a training run. `quiet` says nothing; the output goes to stderr, so that stdout holds
    only what a command was asked for. Use as a context around the steps of a run."""

    LINE_EVERY = 10.0
    """Seconds between lines where there is no terminal to draw a bar on."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._started = time.monotonic()
        self._first_step = 0

    def say(self, text: str) -> None:
        """One line (or more) for the person."""
        self._console.print(text, markup=False)

    @contextmanager
    def counting(self, doing: str, what: str) -> Generator[Callable[[int, int], None]]:
        """Inside, follows work of known size through the function that it gives: done, and of how many."""
        if self._console.quiet or not self._console.is_terminal:
            last = time.monotonic()

            def line(done: int, of: int) -> None:
                nonlocal last
                if time.monotonic() - last >= self.LINE_EVERY:
                    self.say(f"{doing}: {done:,} of {of:,} {what}")
                    last = time.monotonic()

            yield line
            return
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
        # what a command prints goes to stdout all the same
        with Progress(*columns, console=self._console, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(doing)
            yield lambda done, of: bar.update(task, completed=done, total=of)

    def start(self, step: int, steps: int) -> Self:
        """Begins to follow a run at `step` of `steps`."""
        self._first_step, self._started, self._last_line = step, time.monotonic(), 0.0
        if self._console.is_terminal and not self._console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("training", total=steps, completed=step, figures="")
        return self

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def step(self, metrics: dict[str, Any], steps: int) -> None:
        """Shows the metrics of a step that ended."""
        figures = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=metrics["step"], figures=figures)
        now = time.monotonic()
        if "validation_loss" in metrics:
            self.say(f"step {metrics['step']}/{steps}  {figures}  validation loss {metrics['validation_loss']:.3f}")
            self._last_line = now
        elif not self._bar and now - self._last_line >= self.LINE_EVERY:
            left = (now - self._started) / (metrics["step"] - self._first_step) * (steps - metrics["step"])
            self.say(f"step {metrics['step']}/{steps}  {figures}  {duration(left)} left")
            self._last_line = now


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
