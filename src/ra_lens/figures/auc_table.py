"""The table of areas under the perturbation curves: a row per task, a column per order of heads.

A panel per number of shots. In each row of a panel the largest area is framed and bold: it is the
order of the heads that serves this task best with that many shots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from typing_extensions import Unpack

from ra_lens.figures.style import (
    Layout,
    check_frame,
    finish,
    frame_cells,
    method_styles,
    order_name,
    plotly_text,
    read_size,
)
from ra_lens.tables import best_of_rows, table_rows
from ra_lens.text import short, shots_name

_CELL = ("task", "n_shots", "method", "direction")
_SCALE = [[0.0, "#ffffff"], [1.0, "#8ab8e0"]]
_ROW, _COLUMN, _NAMES, _HEAD = 22, 33, 172, 128


def auc_table(frame: pd.DataFrame, **layout: Unpack[Layout]) -> go.Figure:
    """Draw the areas under the perturbation curves as a table with shaded cells.

    Args:
        frame: From `area_under_curve`, of one model.
        **layout: `title`, above the table (default: a line that says what it shows); `width` and
            `height` in pixels (default: by the numbers of columns and rows, so that the numbers
            fit); `template` of plotly, for this figure only.

    Returns:
        A figure with a heatmap per number of shots, named `0 shots` and so on; `z` holds the areas,
        `y` the tasks and, below a gap, their means, `x` the orders.

    Raises:
        BadInput: not such a frame, or of several models.
    """
    width, height = read_size(layout)
    check_frame(
        frame, what="area_under_curve()", columns=["model", "kind", *_CELL, "auc"], cell=_CELL
    )
    shots = [int(n) for n in sorted(frame["n_shots"].unique())]
    orders = _orders(frame)
    rows = {
        f"<b>{name}</b>" if name == f"mean of {len(tasks)} tasks" else plotly_text(name): tasks
        for name, tasks in table_rows(frame).items()
    }
    beside = max(1, min(len(shots), 22 // len(orders)))
    down = -(-len(shots) // beside)
    above = 44 if layout.get("title") is None else 66
    high = above + down * (_HEAD + _ROW * len(rows)) + 12
    wide = _NAMES + beside * (len(orders) * _COLUMN + 24) + 20
    plot_high = max((height or high) - above - _HEAD - 12, 1)
    plot_wide = max((width or wide) - _NAMES - 20, 1)
    figure = make_subplots(
        rows=down,
        cols=beside,
        shared_yaxes=True,
        horizontal_spacing=0 if beside == 1 else min(0.9 / (beside - 1), 24 / plot_wide),
        vertical_spacing=0 if down == 1 else min(0.95 / (down - 1), _HEAD / plot_high),
    )
    largest = float(frame["auc"].max())
    for i, n in enumerate(shots):
        where: dict[str, Any] = {"row": i // beside + 1, "col": i % beside + 1}
        panel: Any = frame[frame["n_shots"] == n]
        heatmap = _heatmap(panel, n, rows, orders, largest)
        figure.add_trace(heatmap, **where)
        frame_cells(figure, best_of_rows(np.asarray(heatmap.z, dtype=float)), "best", 1.8, where)
        figure.update_xaxes(
            type="category",
            side="top",
            tickangle=-90,
            showgrid=False,
            title={"text": f"<b>{shots_name(n)}</b>", "standoff": 6},
            **where,
        )
    subtitle = (
        f"area under the perturbation curve · {plotly_text(str(frame['model'].iloc[0]))} · "
        "framed: largest of the row"
    )
    finish(
        figure,
        layout,
        width=wide,
        height=high,
        above=(44 + _HEAD, 66 + _HEAD),
        subtitle=subtitle,
        plot_bgcolor=None,
        margin={"l": _NAMES, "r": 20, "b": 12},
    )
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, automargin=True, tickfont_size=11
    )
    return figure


def _orders(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    found = set(frame[["method", "direction"]].itertuples(index=False, name=None))
    return {
        style.name + (f" {direction}" if direction in ("reversed", "absolute") else ""): (
            method,
            direction,
        )
        for method, style in method_styles(frame["method"]).items()
        for direction in ("forward", "none", "reversed", "absolute")
        if (method, direction) in found
    }


def _heatmap(
    frame: pd.DataFrame,
    n_shots: int,
    rows: dict[str, list[str]],
    orders: dict[str, tuple[str, str]],
    largest: float,
) -> go.Heatmap:
    cells = frame.set_index(["task", "method", "direction"])
    styles = method_styles(frame["method"])
    values = np.full((len(rows), len(orders)), np.nan)
    hover = np.full(values.shape, "", dtype=object)
    for i, (row, tasks) in enumerate(rows.items()):
        for j, (method, direction) in enumerate(orders.values()):
            keys = [(t, method, direction) for t in tasks]
            found = cells.loc[[key for key in keys if key in cells.index]]
            if found.empty:
                continue
            values[i, j] = found["auc"].mean()
            name = order_name(styles[method], direction)
            hover[i, j] = f"<b>{row}</b>, {shots_name(n_shots)}<br>{name}: {values[i, j]:.3f}"
            hover[i, j] += _details(found, tasks)
    best = best_of_rows(values)
    text = [
        [f"<b>{short(v)}</b>" if best[i, j] else short(v) for j, v in enumerate(row)]
        for i, row in enumerate(values)
    ]
    return go.Heatmap(
        name=shots_name(n_shots),
        z=values,
        x=list(orders),
        y=list(rows),
        text=text,
        customdata=hover,
        texttemplate="%{text}",
        textfont={"size": 11, "color": "#1f2937"},
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        zmin=0,
        zmax=largest if largest > 0 else 1.0,
        colorscale=_SCALE,
        showscale=False,  # the numbers are there
        xgap=2,
        ygap=2,
    )


def _details(found: pd.DataFrame, tasks: list[str]) -> str:
    if len(tasks) > 1:
        return f"<br>mean of {len(found)} tasks" if len(found) < len(tasks) else ""
    row = found.iloc[0]
    if "draws" not in row or int(row["draws"]) <= 1:
        return ""
    return f"<br>mean of {int(row['draws'])} draws, {row['auc_low']:.3f} to {row['auc_high']:.3f}"
