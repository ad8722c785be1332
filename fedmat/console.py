"""What the command line shows: progress while it works, tables and plain words at the end, one panel for an error.

Knows: terminals. Refuses to know: how anything is computed. Progress and errors go to stderr, so that stdout holds
the answer alone and can be read by a machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedmat.errors import FedmatError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fedmat.data.records import CheckReport

_PLAIN_WIDTH = 120  # of output that goes to a file or a pipe
_STEPS = ("ingest", "version", "featurize")  # of every site
_SAID = {
    "gather": "parties connect",
    "job": "a job at the FLARE server",
    "carry": "files to carry",
    "baselines": "local-only, fine-tuned and pooled models",
    "evaluate": "scoring every model on held-out groups",
    "report": "writing the report",
    "register": "registering the model",
}


def out() -> Console:
    """Returns the console for answers."""
    return _console(stderr=False)


def err() -> Console:
    """Returns the console for progress and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and console.width < _PLAIN_WIDTH:
        console.width = _PLAIN_WIDTH
    return console


def say(text: str) -> None:
    """Writes a line of news to stderr."""
    err().print(text, markup=False)


def write_json(value: Any) -> None:
    """Writes an answer for a machine to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show_error(error: FedmatError) -> None:
    """Shows what happened and what to do, without a traceback."""
    body = Text(error.what)
    if error.fix:
        body.append("\n\nWhat to do: ", style="bold")
        body.append(error.fix)
    title = f"{type(error).__name__} (exit code {error.exit_code})"
    err().print(Panel(body, title=title, title_align="left", border_style="red"))


def show_bug(error: Exception) -> None:
    """Shows that something unforeseen happened; its text may hold a record's value, so it is kept back."""
    body = Text(f"fedmat did not expect this: {type(error).__name__}.\n\n")
    body.append("What to do: ", style="bold")
    body.append("run the same command with --debug to see where, and report it as a bug (look through the text first: it may ")
    body.append("quote your data).")
    err().print(Panel(body, title="bug (exit code 1)", title_align="left", border_style="red"))


# --- progress ----------------------------------------------------------------------------------------------------


class RunProgress:
    """Shows a run's events: bars on a terminal, one line an event elsewhere."""

    def __init__(self, sites: int, rounds: int) -> None:
        self._sites, self._rounds = sites, rounds
        self._console = err()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._told = 0.0

    @contextmanager
    def showing(self) -> Iterator[RunProgress]:
        """Shows the bars for the time of a run."""
        if not self._console.is_terminal:
            yield self
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as bars:
            self._bars = bars
            self._bar("sites", "sites prepare their data", len(_STEPS) * self._sites, "starting")
            yield self

    def __call__(self, event: Any) -> None:
        """Takes a :class:`flows.shared.Step` or a :class:`fedmat.domain.RoundReport`."""
        if hasattr(event, "accepted"):
            self._round(event)
        else:
            self._step(event)

    def _step(self, event: Any) -> None:
        if event.state == "started":
            self._started[event.name] = time.monotonic()
        who = event.site or "consortium"
        if self._bars is None:
            took = time.monotonic() - self._started.get(event.name, time.monotonic())
            if event.state == "done":
                self._line(f"{who}: {event.name} done, {took:.1f} s" + (f" ({event.detail})" if event.detail else ""))
            elif event.state == "failed":
                self._line(f"{who}: {event.name} failed")
            elif event.detail:
                self._line(f"{who}: {event.name}, {event.detail}")
        elif event.name in _STEPS:
            done = event.state != "started"
            note = f"{who}: {event.detail or event.name}"
            self._bars.update(self._tasks["sites"], advance=int(done), note=escape(note if event.state != "failed" else who))
        elif event.name in _SAID:
            task = self._bar(event.name, _SAID[event.name], 1, "")
            self._bars.update(task, completed=int(event.state == "done"), note=escape(event.detail))
        elif event.name == "train" and event.state == "started":
            self._bar("train", "rounds of training", self._rounds, "")
        elif event.name == "train" and event.state == "done":
            self._bars.update(self._bar("train", "rounds of training", self._rounds, ""), completed=self._rounds)

    def _round(self, report: Any) -> None:
        left = len(report.dropouts) + len(report.rejections)
        error = report.validation.get("mae", report.validation.get("auc"))
        note = f"{len(report.accepted)} sites" + (f", {left} left out" if left else "")
        judged = sorted(set(report.excluded) - set(report.shares))
        note += f", not counted by the rule: {', '.join(judged)}" if judged else ""
        note += f", validation {'mae' if 'mae' in report.validation else 'auc'} {error:.4g}" if error is not None else ""
        number = report.round + 1
        if self._bars is not None:
            task = self._bar("train", "rounds of training", report.rounds, "")
            self._bars.update(task, completed=number, note=note)
        elif number == report.rounds or left or time.monotonic() - self._told > 2.0:
            self._told = time.monotonic()
            self._line(f"round {number} of {report.rounds}: {note}")

    def _bar(self, name: str, text: str, total: int, note: str) -> TaskID:
        if self._bars is None:
            raise RuntimeError("no bars are shown")
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(text, total=total, note=escape(note))
        return self._tasks[name]

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Shows a spinner on a terminal while something of unknown length goes on."""
    console = err()
    if console.is_terminal:
        with console.status(escape(text)):
            yield
    else:
        yield


@contextmanager
def downloads() -> Iterator[Callable[[str, int, int | None], None]]:
    """Gives a function that is told (file, bytes so far, bytes in all) and shows it on a terminal."""
    console = err()
    if not console.is_terminal:
        yield lambda _file, _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def told(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(escape(file), total=total)
            bars.update(tasks[file], completed=done, total=total)

        yield told


# --- answers -----------------------------------------------------------------------------------------------------


def show_result(metrics: Mapping[str, Any]) -> None:
    """Shows a run's table and what it means."""
    from fedmat import verdict as words

    metric, unit = metrics["task"]["metric"], words.unit_of(metrics)
    better = "higher is better" if metric == "auc" else "lower is better"
    console = out()
    unit = f" in {unit}" if unit else ""
    console.print(f"[bold]{escape(metrics['title'])}[/]")
    console.print(f"{metric.upper()}{unit} on each site's held-out materials; {better}", markup=False)
    grid = Table()
    grid.add_column("site")
    grid.add_column("records", justify="right")
    rows = words.table(metrics)
    abroad = any(row["global_local"] is not None for row in rows)
    for name in ("alone", "federated", "fine-tuned", "personal", "pooled", "gain", *(["alone on all"] if abroad else [])):
        grid.add_column(name, justify="right")
    for row in rows:
        last = row is rows[-1]
        if last:
            grid.add_section()
        cells = []
        for arm in ("local", "federated", "finetuned", "personal", "pooled"):
            value = row[f"own_{arm}"]
            text = words.number(value) if value is not None else "-"
            cells.append(f"[bold green]{text} *[/]" if row["best"] == arm else text)
        gain = words.percent(row["personal_gain_percent"]) if row["personal_gain_percent"] is not None else "-"
        everywhere = [words.number(row["global_local"]) if row["global_local"] is not None else "-"] if abroad else []
        grid.add_row(escape(row["site"]), f"{row['rows']:,}", *cells, gain, *everywhere)
    console.print(grid)
    note = "* best for the site; personal: the site's own mixture of these models; gain: personal against alone"
    if metrics["simulated"]:
        note += (
            "; pooled: all records in one place, an upper bound;\nalone on all: the site's own model on every site's materials"
        )
    console.print(f"[dim]{note}[/]\n")
    for paragraph, lines in words.verdict(metrics):
        console.print(paragraph, markup=False)
        for line in lines:
            console.print(f"  {line}", markup=False)


def show_check(found: CheckReport) -> None:
    """Shows what ``fedmat site check`` found."""
    console = out()
    console.print(
        f"{found.site}: {found.n_rows:,} rows read as {found.record_type} records, {found.n_accepted:,} accepted, "
        f"{found.n_rejected:,} rejected, {found.n_groups:,} materials",
        markup=False,
    )
    if found.findings:
        columns = ("rows", "file", "your column", "contract field", "what is wrong", "first rows")
        rows = [
            (f.rows, f.file, f.column, f.field, f"{f.reason} ({f.code})", ", ".join(map(str, f.first_rows)))
            for f in found.findings
        ]
        show_rows("", columns, rows, right=("rows",))
    for text in found.warnings:
        console.print(f"note: {text}", markup=False)
    for text in found.problems:
        console.print(Panel(Text(text), title="keeps the site from taking part", title_align="left", border_style="red"))
    if found.ok:
        console.print(f"Ready to take part. Rejected rows stay at the site; the rest predict {found.target}.", markup=False)


def show_where(places: Sequence[tuple[str, str]]) -> None:
    """Shows where to look next: (what, path or command)."""
    console = out()
    console.print("\n[bold]Where to look next[/]")
    width = max(len(what) for what, _ in places)
    for what, where in places:
        console.print(f"  {what:<{width}}  {where}", markup=False, soft_wrap=True)


def show_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Shows a plain table on stdout."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        first = name == columns[0]
        grid.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=first)
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    out().print(grid)


def show_path(path: Path) -> str:
    """Returns a path as short as it can be typed from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
