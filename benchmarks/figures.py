"""The figures of docs/performance.md from what was measured: `python -m benchmarks.figures`.

Images need kaleido (`pip install "ra-lens[images]"`) and a Chrome or Chromium.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import typer
from plotly.subplots import make_subplots

from benchmarks.bars import FONT, OURS, SCALE, SOFT, Row, bars, distinct, finish_white
from benchmarks.engine import GPT2
from benchmarks.models import HUGGING_FACE
from benchmarks.page import cell
from ra_lens.figures import save_figure

DOCS = Path(__file__).parents[1] / "docs"
LIMITED = "run_with_ra"
# What a run with all maps may take on a CPU, over the forward pass of the same model.
LIMITS = {
    ("HookedTransformer", "8 × 64"): 1.30,
    ("HookedTransformer", "1 × 512"): 1.35,
    ("TransformerBridge", "8 × 64"): 1.40,
    ("TransformerBridge", "1 × 512"): 1.65,
}

Table = dict[str, Any]


def engine(table: Table) -> go.Figure:
    """run_with_ra over a forward pass: a panel per shape, class and size, with GPT-2's limits."""
    panels: dict[str, list[Row]] = {}
    for row in records(table):
        if row["model"] == HUGGING_FACE:
            continue
        of = "" if row["shape"] == GPT2 else f"{row['shape']}, "
        panels.setdefault(f"{of}{row['model']}, {row['batch × tokens']}", []).append(row)
    limits = {(f"{m}, {s}", LIMITED): limit for (m, s), limit in LIMITS.items()}
    return bars(
        panels,
        value="over the forward pass",
        columns=2,
        axis="time over the model's own forward pass",
        limits=limits,
    )


def peers(table: Table) -> go.Figure:
    """Every route over Hugging Face's forward pass: a panel per shape."""
    rows = records(table)
    shapes = distinct(rows, "batch × tokens")
    return bars(
        {f"{shape} tokens": [r for r in rows if r["batch × tokens"] == shape] for shape in shapes},
        value="over Hugging Face's forward pass",
        columns=len(shapes),
        axis="time over Hugging Face's forward pass",
    )


def memory(table: Table) -> go.Figure:
    """Peak memory of each route over the bare pass: a panel per model class and shape."""
    value = "over the bare pass"
    rows = [row for row in records(table) if row[value] is not None]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['model']}, {row['batch × tokens']} tokens", []).append(row)
    return bars(
        panels,
        value=value,
        columns=2,
        axis="peak memory over the bare pass",
        beside=lambda row: f"{cell(row['peak, MB'])} MB",
    )


def growth(table: Table) -> go.Figure:
    """Time above, peak below, against each axis that grows, on logarithmic scales."""
    rows = records(table)
    axes = distinct(rows, "axis")
    shown = {"s": "time, s", "peak, MB": "peak memory, MB"}
    figure = make_subplots(
        rows=2,
        cols=len(axes),
        shared_xaxes=True,
        shared_yaxes=True,
        column_widths=[2.6, *[1.0] * (len(axes) - 1)],
        horizontal_spacing=0.02,
        vertical_spacing=0.1,
        subplot_titles=[
            title if axis == axes[0] else "" for title in shown.values() for axis in axes
        ],
    )
    for i, column in enumerate(shown, start=1):
        known = [row[column] for row in rows if row[column] is not None] or [1.0]
        low, high = 0.55 * min(known), 2.2 * max(known)
        for j, axis in enumerate(axes, start=1):
            points = [
                (row["value"], row[column])
                for row in rows
                if row["axis"] == axis and row[column] is not None
            ]
            for slope in (2, 1) if j == 1 else (1,):
                figure.add_traces(_guide(points, slope, low, named=j == 1), rows=i, cols=j)
            figure.add_trace(_line(points, f"{axis}, {column}"), row=i, col=j)
        ticks = [n * 10.0**d for d in range(-3, 7) for n in (1, 3) if low <= n * 10.0**d <= high]
        figure.update_yaxes(
            type="log",
            range=[math.log10(low), math.log10(high)],
            tickvals=ticks,
            ticktext=[f"{tick:,g}" for tick in ticks],
            row=i,
        )
    for j, axis in enumerate(axes, start=1):
        values = sorted({row["value"] for row in rows if row["axis"] == axis})
        span = math.log10(values[-1] / values[0])
        figure.update_xaxes(
            type="log",
            # The first point's number stands left of it.
            range=[
                math.log10(values[0]) - (0.19 if j == 1 else 0.5) * span,
                math.log10(values[-1]) + (0.05 if j == 1 else 0.12) * span,
            ],
            tickvals=values,
            ticktext=[f"{value:,}" for value in values],
            tickangle=0,
            col=j,
        )
        figure.update_xaxes(title={"text": axis, "font": {"size": FONT}}, row=2, col=j)
    finish_white(figure, height=820)
    figure.update_annotations(x=0, xanchor="left")
    figure.update_layout(margin={"l": 84, "r": 16, "t": 44, "b": 72})
    return figure


FIGURES: dict[str, Callable[[Table], go.Figure]] = {
    "engine": engine,
    "peers": peers,
    "memory": memory,
    "growth": growth,
}


def file_name(table: str) -> str:
    """Where the figure of a table lies, from the folder of the page."""
    return f"figures/performance-{table}.png"


def records(table: Table) -> list[Row]:
    """The rows of a table, by the names of their columns."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _line(points: list[tuple[float, float]], name: str) -> go.Scatter:
    ends = (0, len(points) - 1)
    return go.Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="lines+markers+text",
        text=[cell(float(y)) if i in ends else "" for i, (_, y) in enumerate(points)],
        textposition="top left",
        line={"color": OURS, "width": 3},
        marker={"size": 9, "color": OURS},
        name=name,
        cliponaxis=False,
    )


def _guide(
    points: list[tuple[float, float]], slope: int, low: float, *, named: bool
) -> list[go.Scatter]:
    """Back from the last point, as far as the panel goes: y = y_last (x / x_last)^slope."""
    if len(points) < 2:
        return []
    first, (last, y) = points[0][0], points[-1]
    start = max(first, last * (low / y) ** (1 / slope))
    xs = [start, math.sqrt(start * last), last]
    return [
        go.Scatter(
            x=xs,
            y=[y * (x / last) ** slope for x in xs],
            mode="lines+text" if named else "lines",
            text=["", f" slope {slope} ", ""] if named else None,
            textposition="top left" if slope == 1 else "bottom right",
            textfont={"color": SOFT},
            line={"color": SOFT, "width": 1.5, "dash": "dot"},
            name=f"slope {slope}",
        )
    ]


def main(
    folder: Annotated[Path, typer.Option(help="Of performance.json; images in figures.")] = DOCS,
) -> None:
    """Draw every figure whose table has rows."""
    tables = json.loads((folder / "performance.json").read_text(encoding="utf-8"))
    (folder / "figures").mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        if tables.get(name, {"rows": []})["rows"]:
            print(save_figure(draw(tables[name]), folder / file_name(name), scale=SCALE))


if __name__ == "__main__":
    typer.run(main)
