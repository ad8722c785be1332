"""Plots as inline SVG: small, without network, readable on light and dark pages.

Knows: matplotlib and how its output becomes part of a page. Refuses to know: runs, metrics, files.
Colours are CSS variables of the page, so that one picture serves both colour schemes; text stays text.

References:
    Okabe & Ito, "Color Universal Design", 2008 (the palette; series differ in marker or line style too).
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _GRID = "#0a0b0c", "#c0c1c2"
_SERIES = ("#0072b1", "#e69f01", "#019e73", "#cc79a6", "#56b4e8", "#d55e01", "#8c6d31", "#6b6ecf")
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--rule)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fedmat", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "axes.titlesize": 9, "axes.titlecolor": _INK,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.grid": True, "grid.color": _GRID,
    "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
_MARKS, _LINES = "osD^vP*X", ("-", "--", "-.", ":")
COLOURS: Mapping[str, int] = {"federated": 0, "local": 1, "finetuned": 2, "pooled": 3, "dummy": 6, "personal": 5}


@dataclass(frozen=True)
class Point:
    """One value with its 95% interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def intervals(rows: Mapping[str, Mapping[str, Point]], arms: Mapping[str, str], unit: str, about: str) -> str:
    """Returns dots with intervals: one line per row, one colour and marker per arm (key -> label)."""
    with _page() as new:
        figure = new(7.2, 0.9 + 0.14 * sum(len(v) + 1.2 for v in rows.values()))
        axes = figure.subplots()
        at, ticks = 0.0, []
        for points in rows.values():
            start = at
            for key in (a for a in arms if a in points):
                p, colour = points[key], _SERIES[COLOURS[key]]
                if p.low is not None and p.high is not None:
                    axes.plot([p.low, p.high], [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot([p.value], [at], _MARKS[COLOURS[key]], color=colour, markersize=6)
                at += 1.0
            ticks.append((start + at - 1.0) / 2)
            at += 1.2
        axes.set_yticks(ticks, [_short(name) for name in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_ylim(at - 1.4, -0.8)
        axes.set_xlabel(unit)
        shown = [a for a in arms if any(a in points for points in rows.values())]
        for key in shown:
            axes.plot([], [], _MARKS[COLOURS[key]] + "-", color=_SERIES[COLOURS[key]], label=arms[key])
        figure.legend(loc="outside upper left", ncols=len(shown), handlelength=1.8, columnspacing=1.4)
        return _svg(figure, about)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], xlabel: str, about: str, *, log: bool = True
) -> str:
    """Returns lines over rounds: one panel per quantity, one line per series; a missing round leaves a gap."""
    with _page() as new:
        figure = new(7.2, 2.7 if len(panels) > 1 else 2.4)
        for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for i, (name, points) in enumerate(lines.items()):
                x, y = _gapped(points)
                mark = "." if len(points) <= 40 else ""
                axes.plot(
                    x, y, mark + _LINES[i // len(_SERIES) % 4], color=_SERIES[i % len(_SERIES)], label=_short(name), lw=1.4
                )
            values = [v for points in lines.values() for _, v in points]
            if log and values and min(values) > 0 and max(values) / min(values) > 100:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")  # matplotlib's own labels would be TeX
                axes.yaxis.set_minor_formatter(lambda *_: "")
            elif values and min(values) >= 0:
                axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left")
            axes.set_xlabel(xlabel)
            if len(lines) > 1:
                axes.legend(fontsize=8)
        return _svg(figure, about)


def bars(rows: Mapping[str, Mapping[str, float]], unit: str, about: str) -> str:
    """Returns stacked horizontal bars: one bar per row, one colour per part, numbers written into wide parts."""
    parts = sorted({k for values in rows.values() for k in values})
    with _page() as new:
        figure = new(7.2, 0.9 + 0.28 * len(rows))
        axes = figure.subplots()
        left = np.zeros(len(rows))
        for i, part in enumerate(parts):
            width = np.array([float(values.get(part, 0.0)) for values in rows.values()])
            axes.barh(range(len(rows)), width, 0.6, left=left, color=_SERIES[i % len(_SERIES)], label=part,
                      alpha=1.0 if i < len(_SERIES) else 0.55)  # fmt: skip
            left += width
        axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        figure.legend(loc="outside upper left", ncols=min(4, max(1, len(parts))), handlelength=1.2)
        return _svg(figure, about)


def parity(panels: Sequence[tuple[str, Sequence[tuple[np.ndarray, np.ndarray]]]], unit: str, about: str) -> str:
    """Returns one square panel per entry: counts of true (across) by predicted (up), darker where there are more rows.

    Args:
        panels: title and layers of (bin edges ``bins + 1``, counts ``bins x bins`` true by predicted).
        unit: of both axes.
        about: what a person who cannot see the picture is told.
    """
    from matplotlib.colors import LinearSegmentedColormap

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    rgb = tuple(int(_SERIES[0][i : i + 2], 16) / 255 for i in (1, 3, 5))
    fade = LinearSegmentedColormap.from_list("fade", [(*rgb, 0.0), (*rgb, 0.35), (*rgb, 1.0)])
    with _page() as new:
        width = 3.6 if len(panels) == 1 else 2.4
        figure = new(width * columns, (width + 0.15) * lines)
        grid = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
        for axes, (title, layers) in zip(grid, panels, strict=False):
            low = min(float(edges[0]) for edges, _ in layers)
            high = max(float(edges[-1]) for edges, _ in layers)
            for edges, counts in layers:
                shade = np.sqrt(counts.T / max(1.0, float(counts.max())))
                box = (float(edges[0]), float(edges[-1]), float(edges[0]), float(edges[-1]))
                axes.imshow(shade, origin="lower", extent=box, cmap=fade, vmin=0, vmax=1, interpolation="none", aspect="equal")
            axes.plot([low, high], [low, high], color=_INK, linewidth=0.8)
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            axes.set_title("\n".join(_short(line, 30) for line in title.split("\n")), loc="left")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel(f"measured, {unit}".rstrip(", "), fontsize=9)
        figure.supylabel(f"predicted, {unit}".rstrip(", "), fontsize=9)
        return _svg(figure, about)


def roc(lines: Mapping[str, np.ndarray], about: str) -> str:
    """Returns true-positive over false-positive rate from counts of shape ``2 x bins`` (negatives, positives)."""
    with _page() as new:
        figure = new(4.6, 3.6)
        axes = figure.subplots()
        for i, (name, counts) in enumerate(lines.items()):
            rates = np.concatenate([np.zeros((2, 1)), np.cumsum(counts[:, ::-1], axis=1)], axis=1)
            rates = rates / np.maximum(rates[:, -1:], 1.0)
            axes.plot(
                rates[0], rates[1], _LINES[i // len(_SERIES) % 4], color=_SERIES[i % len(_SERIES)], label=_short(name), lw=1.4
            )
        axes.plot([0, 1], [0, 1], ":", color=_INK, linewidth=0.8)
        axes.set_xlabel("false positives, share of the negatives")
        axes.set_ylabel("true positives, share of the positives")
        axes.legend(fontsize=8, loc="lower right")
        return _svg(figure, about)


@contextmanager
def _page() -> Iterator[Callable[[float, float], Figure]]:
    """Gives a maker of figures (inches) under this module's style; no global matplotlib state stays changed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(_STYLE)):
        yield lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, about: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # neither XML declaration nor doctype inside a page
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|matplotlib|xtick|ytick|text|legend|PathCollection|QuadMesh|image)[^"]*"', "", text
    )
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    label = html.escape(about, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" class="plot"', 1)


def _gapped(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    x: list[float] = []
    y: list[float] = []
    for step, value in points:
        if x and step > x[-1] + 1:
            x.append(x[-1] + 1)
            y.append(math.nan)
        x.append(step)
        y.append(value)
    return x, y


def _short(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
