"""Knockouts foretold and measured: a scatter, and how well they agree by layer, attention or width.

A change of the loss has both signs and four orders of magnitude, so that it is drawn at

    x(s) = asinh(s / 0.01)       near 0 in proportion to s, far from 0 to the logarithm of |s|

on axes whose ticks are labelled with the changes themselves, in nats.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput, one_of
from ra_lens.figures.curves import panel_columns
from ra_lens.figures.style import Layout, finish, panels, plotly_text
from ra_lens.knockouts.agreement import (
    FORECASTS,
    Forecast,
    forecasts_of,
    knockout_agreement,
)
from ra_lens.scales import axis_position
from ra_lens.tables import problem_of
from ra_lens.text import short

By = Literal["layer", "pattern", "window"]
Agreement = Literal["spearman", "pearson", "sign"]

_LINEAR = 0.01
_TICKS = (0.01, 0.1, 1.0, 10.0)
_NEEDED = ("cut", "what", "window", "drawn", "layer", "pattern", "measured", "predicted")
_SIZES = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)
"""Where the classes of attention end."""
_DRAWN = {
    "random": ("drawn at random", "#0072b2", "circle"),
    "strongest": ("largest |R|", "#d55e00", "diamond"),
    "span": ("a span", "#0072b2", "circle"),
    "span and first": ("span and first token", "#cc79a7", "square"),
    "first": ("first token", "#e69f00", "diamond"),
}
_KINDS = {"span": "A span", "span and first": "Span and first token", "first": "First token"}
_AGREEMENT = {
    "spearman": "Spearman’s ρ",
    "pearson": "Pearson’s r",
    "sign": "right signs where |Δ| > .01",
}
_AXES: dict[By, str] = {
    "layer": "layer of the edge",
    "pattern": "A of the edge that is cut",
    "window": "layers in which it is cut",
}
# Colour and dash: what one backward pass gives is solid, what takes more is dashed.
_LINES = {
    "predicted": ("#d55e00", "solid"),
    "a_grad": ("#0072b2", "solid"),
    "minus_ra": ("#cc79a7", "solid"),
    "input_grad": ("#8c5e2a", "solid"),
    "pattern": ("#6b7280", "dot"),
    "grad": ("#56b4e9", "dot"),
    "value": ("#009e73", "dot"),
    "end": ("#e69f00", "dash"),
    "trapezoid": ("#b8860b", "dash"),
}
_STEPS = ("#5b3a8e", "#7d8a00", "#22637a", "#b23fb5")


def knockout_scatter(
    frame: pd.DataFrame, *, forecast: str = "predicted", **layout: Unpack[Layout]
) -> go.Figure:
    """Draw what was foretold of each cut against what was measured; a panel for each width.

    Args:
        frame: From `knockout_test`, of one model and one kind of cut.
        forecast: Which column: `predicted`, or another of those that such a table holds.
        **layout: `title`, above the figure (default: a line that says what is shown); `width` and
            `height` in pixels (default: as wide as its container, and by the number of panels);
            `template` of plotly, for this figure only.

    Returns:
        A figure with, per panel, a trace for each way in which cuts were drawn; `customdata` are
        the change foretold and measured, `x` and `y` where they are drawn. On the dotted diagonal
        both are the same. The title of a panel gives Spearman's ρ.

    Raises:
        BadInput: not such a frame, several models or kinds of cut in it, or an unknown column.
    """
    _check(frame)
    known = {one.column: one for one in forecasts_of(frame)}
    one_of("forecast", forecast, tuple(known))
    cuts: Any = frame[frame[forecast].notna()]
    frame = cuts
    found = knockout_agreement(frame, by=("what", "window"), resamples=1)
    rho = found[found["method"] == forecast].set_index(["what", "window"])["spearman"]
    groups: list[tuple[str, int]] = sorted(rho.index)
    names = [f"{_group_name(*group)}, ρ {short(float(rho[group]))}" for group in groups]
    figure, places = panels(
        names,
        layout,
        columns=min(len(names), 2),
        each=330,
        around=150,
        gap=64,
        horizontal_spacing=0.06,
        x_title=f"{plotly_text(known[forecast].label)} (nats, asinh axis)",
        y_title="change of the loss measured (nats, asinh axis)",
    )
    listed: set[str] = set()
    most = float(frame[[forecast, "measured"]].abs().to_numpy().max())
    end = axis_position(max(most, _LINEAR) * 1.2, _LINEAR)
    for (what, window), place in zip(groups, places, strict=True):
        panel: Any = frame[(frame["what"] == what) & (frame["window"] == window)]
        figure.add_trace(
            go.Scatter(
                x=[-end, end],
                y=[-end, end],
                mode="lines",
                name="as foretold",
                line={"color": "#4b5563", "width": 1, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
            ),
            **place,
        )
        for drawn, (name, colour, symbol) in _DRAWN.items():
            part: Any = panel[panel["drawn"] == drawn]
            if part.empty:
                continue
            pairs = part[[forecast, "measured"]].to_numpy(float).tolist()
            figure.add_trace(
                go.Scatter(
                    x=[axis_position(x, _LINEAR) for x, _ in pairs],
                    y=[axis_position(y, _LINEAR) for _, y in pairs],
                    customdata=pairs,
                    text=[_described(row) for row in part.to_dict("records")],
                    mode="markers",
                    name=name,
                    legendgroup=drawn,
                    showlegend=drawn not in listed,
                    marker={"size": 5, "color": colour, "symbol": symbol, "opacity": 0.55},
                    hovertemplate=(
                        "%{text}<br>foretold %{customdata[0]:+.4f}, measured "
                        "%{customdata[1]:+.4f}<extra></extra>"
                    ),
                ),
                **place,
            )
            listed.add(drawn)
    _finish(figure, layout, frame, f"{len(frame)} cuts")
    axes = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1 + 22 / max(axes, 1), "yanchor": "bottom"}
    )
    ticks = [tick for tick in _TICKS if axis_position(tick, _LINEAR) <= end]
    values = [-tick for tick in reversed(ticks)] + [0.0, *ticks]
    axis = {
        "range": [-end, end],
        "tickvals": [axis_position(value, _LINEAR) for value in values],
        "ticktext": [f"{value:g}".replace("-", "−") for value in values],
        "zeroline": True,
        "showticklabels": True,
        "tickangle": 0,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def knockout_curves(
    frame: pd.DataFrame,
    *,
    by: By = "window",
    measure: Agreement = "spearman",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw how well each forecast agrees with what was measured: by layer, attention or width.

    Args:
        frame: From `knockout_test`, of one model and one kind of cut.
        by: `"layer"` and `"pattern"`, by classes of A: of single edges; `"window"`: of sets, by the
            number of layers in which they are cut, a panel for each kind of set.
        measure: `"spearman"`, `"pearson"`, or `"sign"`: see `knockout_agreement`.
        **layout: As in `knockout_scatter`.

    Returns:
        A figure with, per panel, a trace for each forecast, which legends name. Behind that of
        `predicted` lies its 90 % interval over the prompts; the others tell theirs where one
        points at them. Dotted lines have no sign; dashed ones take more than one backward pass.

    Raises:
        BadInput: not such a frame, several models or kinds of cut in it, no cut of what is asked
            for, or an unknown option.
    """
    one_of("by", by, get_args(By))
    one_of("measure", measure, get_args(Agreement))
    _check(frame)
    what = "set" if by == "window" else "edge"
    part: Any = frame[frame["what"] == what]
    if part.empty:
        raise BadInput(f"found a table without a cut of {what}s. Run knockout_test(n_{what}s=...).")
    if by == "pattern":
        held: Any = part["pattern"].clip(upper=1.0)
        classes: Any = pd.cut(held, _SIZES, labels=_class_names())
        part = part.assign(pattern_class=classes.astype(str))
    column = "pattern_class" if by == "pattern" else by
    kinds = [kind for kind in _KINDS if kind in set(part["drawn"])] if by == "window" else [""]
    figure, places = panels(
        [_KINDS.get(kind, "") for kind in kinds],
        layout,
        columns=panel_columns(len(kinds)),
        each=380,
        around=120,
        gap=62,
        horizontal_spacing=0.04 if len(kinds) > 1 else 0,
        x_title=_AXES[by],
        y_title=_AGREEMENT[measure],
    )
    listed: set[str] = set()
    order = [*FORECASTS, *(one for one in forecasts_of(part) if one not in FORECASTS)]
    for kind, place in zip(kinds, places, strict=True):
        panel: Any = part[part["drawn"] == kind] if kind else part
        found: Any = knockout_agreement(panel, by=column)
        for one in order:
            rows = found[(found["method"] == one.column) & found[measure].notna()]
            if by == "pattern":
                place_of = {name: i for i, name in enumerate(_class_names())}
                rows = rows.sort_values(column, key=lambda names, of=place_of: names.map(of))
            if rows.empty:
                continue
            if one.column == "predicted":
                figure.add_trace(_band(rows, column, measure), **place)
            trace = _line(one, rows, column, measure, order)
            trace.showlegend = one.column not in listed
            listed.add(one.column)
            figure.add_trace(trace, **place)
    legend = {"font": {"size": 12}, "y": 1, "tracegroupgap": 0}
    count = f"{len(part)} {what}s"
    _finish(figure, layout, part, count, above=(66, 88), legend=legend)
    if by == "window":
        figure.update_xaxes(tickvals=sorted({int(n) for n in part["window"]}))
    elif by == "layer":
        figure.update_xaxes(dtick=1 if part["layer"].nunique() <= 12 else 5)
    elif by == "pattern":
        figure.update_xaxes(categoryorder="array", categoryarray=_class_names())
    figure.update_xaxes(showticklabels=True)
    lowest = min((min(trace.y, default=0.0) for trace in figure.data), default=0.0)
    figure.update_yaxes(range=[min(lowest - 0.03, 0.0), 1.04], zeroline=True)
    return figure


def _class_names() -> list[str]:
    return [f"{low:g}–{high:g}" for low, high in pairwise(_SIZES)]


def _line(one: Forecast, rows: Any, column: str, measure: str, order: list[Forecast]) -> go.Scatter:
    steps = [other.column for other in order if other.column not in _LINES]
    colour, dash = _LINES.get(one.column) or (
        _STEPS[steps.index(one.column) % len(_STEPS)],
        "dash",
    )
    first = one.column == "predicted"
    label = plotly_text(one.label)
    return go.Scatter(
        x=rows[column].tolist(),
        y=rows[measure].to_numpy(float),
        customdata=rows[[f"{measure}_low", f"{measure}_high", "n"]].to_numpy(float),
        mode="lines+markers",
        name=label,
        legendgroup=one.column,
        line={"color": colour, "dash": dash, "width": 3 if first else 1.6},
        marker={"size": 7 if first else 5, "color": colour},
        hovertemplate=(
            f"<b>{label}</b><br>%{{x}}: %{{y:.2f}} [%{{customdata[0]:.2f}}, "
            "%{customdata[1]:.2f}], %{customdata[2]:.0f} cuts<extra></extra>"
        ),
    )


def _band(rows: Any, column: str, measure: str) -> go.Scatter:
    x, low, high = rows[column].tolist(), rows[f"{measure}_low"], rows[f"{measure}_high"]
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*low.tolist(), *reversed(high.tolist())],
        mode="lines",
        name="90 % interval",
        fill="toself",
        fillcolor="rgba(213, 94, 0, 0.15)",
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def _finish(figure: Any, layout: Layout, frame: pd.DataFrame, count: str, **more: Any) -> None:
    tasks = list(dict.fromkeys(frame["task"].astype(str)))
    prompts = len(frame[["task", "n_shots", "question"]].drop_duplicates())
    several = f"{len(tasks)} tasks" if len(tasks) > 1 else f"task {plotly_text(tasks[0])}"
    model = [plotly_text(str(frame["model"].iloc[0]))] if "model" in frame else []
    parts = [*model, several, f"{prompts} prompts", count, f"{frame['cut'].iloc[0]} cuts"]
    more = {"above": (84, 106), "margin": {"l": 72, "r": 20, "b": 62}, **more}
    finish(figure, layout, subtitle=" · ".join(parts), plot_bgcolor=None, **more)


def _group_name(what: str, window: int) -> str:
    if what == "edge":
        return "Single edges"
    return f"Sets in {window} layer{'s' * bool(window != 1)}"


def _described(row: dict[str, Any]) -> str:
    head = "" if row["head"] < 0 else f"H{row['head']}"
    layers = f"L{row['layer']}" + (f" and {row['window'] - 1} more" * bool(row["window"] > 1))
    tokens = plotly_text(f"{row['query_token']} → {row['key_tokens']}")
    return f"<b>{layers}{head}</b> {tokens}, A {row['pattern']:.2f}, {plotly_text(row['task'])}"


def _check(frame: pd.DataFrame) -> None:
    problem = problem_of(frame, list(_NEEDED), rows=True)
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of knockout_test().")
    for column, name in (("model", "models"), ("cut", "kinds of cut")):
        values = list(dict.fromkeys(frame[column].astype(str))) if column in frame else []
        if len(values) > 1:
            raise BadInput(
                f"found {len(values)} {name} ({', '.join(values)}); a figure shows one. Give "
                f"frame[frame[{column!r}] == {values[0]!r}]."
            )
