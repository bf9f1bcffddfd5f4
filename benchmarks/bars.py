"""Panels of horizontal bars for the routes of a table, and what all figures of the page share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.timing import low_high
from ra_lens.figures.style import MARK, finish, plotly_text

OURS, OTHERS, INK, SOFT = "#8f89c3", "#bfc4cb", "#1f2328", "#5c6570"
# A page shows the pixels at about two thirds of their size: sharp enough, in a third of the bytes
# that a scale of 2 would take.
WIDTH, FONT, SCALE = 1200, 20, 1
BAR = 0.62

Row = dict[str, Any]


def bars(
    panels: dict[str, list[Row]],
    *,
    value: str,
    columns: int,
    axis: str,
    limits: dict[tuple[str, str], float] | None = None,
    beside: Callable[[Row], str] | None = None,
) -> go.Figure:
    """Draw a panel for each set of rows, one bar per route, all on one scale.

    Args:
        panels: Rows by the title of their panel; a row has a `route` and may have a `spread`.
        value: The column to draw. Rows without a number in it are left out.
        columns: Panels beside each other.
        axis: Below the scale.
        limits: By panel and route, marked across the bar.
        beside: What to say beside the number of a bar.

    Returns:
        A figure with, per panel, a bar trace whose `customdata` are the routes, a trace for the
        whiskers (`…, spread`) where there are any, and one per limit (`…, limit`).
    """
    limits, columns = limits or {}, min(columns, len(panels))
    routes = distinct([row for rows in panels.values() for row in rows], "route")
    n_rows = -(-len(panels) // columns)
    height = n_rows * (58 * len(routes) + 62) + 62
    figure = make_subplots(
        rows=n_rows,
        cols=columns,
        shared_xaxes="all",  # type: ignore[arg-type]
        shared_yaxes="all",  # type: ignore[arg-type]
        subplot_titles=list(panels),
        horizontal_spacing=0.03,
        vertical_spacing=0 if n_rows == 1 else 62 / (height - 106),
    )
    right, spread_shown = 0.0, False
    for i, (name, rows) in enumerate(panels.items()):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        rows = [row for row in rows if row[value] is not None]
        places = [routes.index(row["route"]) for row in rows]
        values = [row[value] for row in rows]
        spreads = [low_high(row.get("spread")) for row in rows]
        whiskers = _whiskers(values, places, spreads, f"{name}, spread")
        spread_shown = spread_shown or bool(whiskers)
        figure.add_trace(
            go.Bar(
                x=values,
                y=places,
                orientation="h",
                width=BAR,
                name=name,
                customdata=[row["route"] for row in rows],
                marker={"color": [_colour(row["route"]) for row in rows]},
            ),
            **at,
        )
        figure.add_traces(whiskers, rows=at["row"], cols=at["col"])
        for row, place, spread in zip(rows, places, spreads, strict=True):
            end, text = max(row[value], *(spread or (0.0,))), f"<b>{row[value]:.2f}</b>"
            if beside is not None:
                text += f"  {beside(row)}"
            limit = limits.get((name, row["route"]))
            if limit is not None:
                end = max(end, limit)
                text += f"  <span style='color:{MARK}'>limit {limit:.2f}</span>"
                figure.add_trace(_limit(limit, place, f"{name}, limit"), **at)
            figure.add_annotation(
                text=text,
                x=end,
                y=place,
                xanchor="left",
                xshift=4,
                showarrow=False,
                bgcolor="white",  # the line of the base does not cross the number
                borderpad=1,
                **at,
            )
            right = max(right, end)
    finish_white(figure, height=height)
    figure.update_layout(margin={"l": 12, "r": 16, "t": 44, "b": 62})
    room = 1.28 if beside is None else 1.62
    step = next((step for step in (0.5, 1, 2, 5, 10) if right <= 6 * step), 50)
    figure.update_xaxes(
        range=[0, room * right],
        tickvals=[step * k for k in range(int(right / step) + 1)],  # none below the numbers
        showticklabels=False,
        showgrid=False,
    )
    figure.update_xaxes(showticklabels=True, row=n_rows)
    figure.update_yaxes(
        tickvals=list(range(len(routes))),
        ticktext=[_wrapped(route) for route in routes],
        range=[len(routes) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        ticklabelstandoff=6,
    )
    # The base, 1, is what every bar is compared with.
    figure.add_vline(x=1, line={"color": SOFT, "width": 1.5, "dash": "dot"}, layer="below")
    _titles_left(figure, len(panels))
    figure.add_annotation(
        text=f"{axis}; whiskers: smallest and largest in a round" if spread_shown else axis,
        x=0,
        xref="paper",
        xanchor="left",
        y=0,
        yref="paper",
        yanchor="top",
        yshift=-30,
        showarrow=False,
    )
    return figure


def finish_white(figure: go.Figure, *, height: int) -> None:
    """Apply the look of the project's figures, on white, in the sizes of the page."""
    finish(figure, {}, width=WIDTH, height=height)
    figure.update_layout(
        plot_bgcolor=None, font={"size": FONT, "color": INK}, showlegend=False, hovermode=False
    )
    figure.update_annotations(font_size=FONT)


def distinct(rows: list[Row], column: str) -> list[str]:
    """The values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def _titles_left(figure: go.Figure, panels: int) -> None:
    """Put the titles of the panels, the first annotations, above their left corners."""
    for i, note in enumerate(figure.layout.annotations[:panels]):  # type: ignore[index]
        domain: Any = figure.layout[f"xaxis{i + 1 if i else ''}"].domain
        note.update(x=domain[0], xanchor="left")


def _limit(limit: float, place: int, name: str) -> go.Scatter:
    return go.Scatter(
        x=[limit, limit],
        y=[place - 0.5, place + 0.5],
        mode="lines",
        line={"color": MARK, "width": 4},
        name=name,
    )


def _whiskers(
    values: list[float],
    places: list[int],
    spreads: list[tuple[float, float] | None],
    name: str,
) -> list[go.Scatter]:
    """From the smallest to the largest; none where there is no spread, as that of the base."""
    shown = [
        (value, place, *spread)
        for value, place, spread in zip(values, places, spreads, strict=True)
        if spread is not None and spread[0] < spread[1]
    ]
    if not shown:
        return []
    return [
        go.Scatter(
            x=[value for value, _, _, _ in shown],
            y=[place for _, place, _, _ in shown],
            mode="markers",
            marker={"size": 1, "color": INK},
            error_x={
                "type": "data",
                "symmetric": False,
                # The ratio of two medians may lie outside those of single rounds.
                "array": [max(0.0, high - value) for value, _, _, high in shown],
                "arrayminus": [max(0.0, value - low) for value, _, low, _ in shown],
                "color": INK,
                "thickness": 1.6,
                "width": 6,
            },
            name=name,
        )
    ]


def _colour(route: str) -> str:
    return OURS if route.startswith("run_with_ra") else OTHERS


def _wrapped(text: str) -> str:
    return "<br>".join(plotly_text(line) for line in textwrap.wrap(text, 32))
