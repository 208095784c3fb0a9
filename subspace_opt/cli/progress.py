"""Live progress of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from ..lab import Ended, Evaluated, Event, Saved, Started, Stepped
from ..lab.report import readable_bytes


class RunProgress:
    """Shows the events of runs: progress bars on a terminal, otherwise one line for each validation."""

    def __init__(self, out: Console, runs: Sequence[tuple[str, int]]) -> None:
        """`runs`: (name, steps) of all runs that follow."""
        self.out = out
        self.began = False  # True once a run has passed its checks and started
        self.saved: str | None = None  # path of the last checkpoint
        self._last: Stepped | None = None
        self._corpus = ""
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis")),  # shortened first if the terminal is narrow
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=out,
            expand=True,
            disable=not out.is_terminal,
        )
        width = max((len(name) for name, _ in runs), default=0)
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(escape(name.ljust(width)), total=steps, text="") for name, steps in runs
        }
        self._validation: dict[str, str] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started():
                self._start(event)
            case Stepped():
                self._last = event
                self._move(event, f"{event.tokens_per_second:,.0f} tokens/s  {clock(event.eta_seconds)} left")
            case Evaluated():
                self._validation[event.run] = f"val {event.loss:.3f}"
                if not self.out.is_terminal:
                    self._line(event)
            case Saved():
                self.saved = event.path
            case Ended():
                if self._last is not None:
                    self._move(self._last, f"{event.status} in {clock(event.seconds)}")

    def _start(self, event: Started) -> None:
        self.began = True
        self._last = None
        if event.corpus != self._corpus:
            self._corpus = event.corpus
            self._say(f"text: {event.corpus}")
        state = "" if event.state_bytes is None else f", {readable_bytes(event.state_bytes)} of optimizer state"
        resumed = f", resumed after {event.step} updates" if event.step else ""
        self._say(f"{event.run}: {event.parameters:,} parameters on {event.device}{state}{resumed}")
        self._bars.update(self._tasks[event.run], completed=event.step)

    def _move(self, event: Stepped, text: str) -> None:
        losses = [f"loss {event.loss:.3f}", self._validation.get(event.run, ""), text]
        self._bars.update(self._tasks[event.run], completed=event.step, text="  ".join(part for part in losses if part))

    def _line(self, event: Evaluated) -> None:
        parts = [
            f"{event.run}  update {event.step}",
            f"validation {event.loss:.3f} ({event.bits_per_byte:.2f} bits/byte)",
        ]
        if self._last is not None:
            speed, left = f"{self._last.tokens_per_second:,.0f} tokens/s", f"{clock(self._last.eta_seconds)} left"
            parts[1:1] = [f"loss {self._last.loss:.3f}"]
            parts += [speed, left]
        self._say("  ".join(parts))

    def _say(self, line: str) -> None:
        self.out.print(line, markup=False, soft_wrap=True)  # never wrapped: a log line is one line


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
