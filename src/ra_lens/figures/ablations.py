"""What of attention patching carries its effect: a dot and an interval for each variant."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput
from ra_lens.figures.style import Layout, finish, panels, plotly_text
from ra_lens.figures.sweep import MAPS
from ra_lens.questions import METRICS
from ra_lens.tables import problem_of
from ra_lens.text import scale_name, short

_GROUPS = {
    "whole": "Whole map",
    "layers": "Some layers of it",
    "heads": "Some heads of it",
    "rows": "Some query rows of it",
    "sign": "One sign of it",
    "place": "Added otherwise",
    "prompts": "Mean of fewer questions",
    "transfer": "Maps of another task",
    "shots": "Maps of prompts with examples",
    "controls": "Another map in its place",
}
_SCALES = {"paper": "at the paper's scales", "best": "at the best scale of each"}
_NEEDED = (
    "n_shots", "ablation", "variant", "map", "scale_from", "value", "low", "high", "unpatched",
    "whole", "kl", "scale_low", "scale_high", "n_tasks", "n_questions", "model", "metric", "level",
)  # fmt: skip
_UNPATCHED, _WHOLE = "#4b5563", "#d55e00"
_EACH = 19  # pixels of a row


def patching_ablations(frame: pd.DataFrame, **layout: Unpack[Layout]) -> go.Figure:
    """Draw what each variant of a patch gives, grouped by what was changed.

    A panel for each way in which scales were found, a row for each variant: a dot, and its interval
    where the table has single questions. The grey line is the unpatched model and the dotted one
    the whole map, on the same tasks as the row's, so that they have a step where a variant is not
    there for all.

    Args:
        frame: From `ablation_effects`, of one number of demonstrations.
        **layout: `title`, above the figure (default: only a line that says what was averaged);
            `width` and `height` in pixels (default: as wide as its container, and by the number of
            rows); `template` of plotly, for this figure only.

    Returns:
        A figure with, per panel, a trace `unpatched`, a trace `whole map`, and one for each kind of
        map (`RA map`, …), whose `text` are the variants, `x` the values and `customdata` the ends
        of the interval, the scales, KL and number of tasks.

    Raises:
        BadInput: not such a frame, or several numbers of demonstrations in it.
    """
    problem = "without rows" if frame.empty and set(_NEEDED) <= set(frame) else None
    problem = problem or _problem(frame)
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of ablation_effects().")
    shots = sorted({int(n) for n in frame["n_shots"]})
    if len(shots) > 1:
        raise BadInput(
            f"found results with {' and '.join(map(str, shots))} demonstrations; a figure shows "
            f"one number. Give frame[frame.n_shots == {shots[0]}]."
        )
    metric, level = str(frame["metric"].iloc[0]), float(frame["level"].iloc[0])
    patched: Any = frame[frame["ablation"] != "none"]
    variants = list(dict.fromkeys(zip(patched["ablation"], patched["variant"], strict=True)))
    heights, headings = _heights(variants)
    ways = [way for way in _SCALES if way in set(patched["scale_from"])]
    figure, places = panels(
        [_SCALES[way] for way in ways],
        layout,
        columns=len(ways),
        each=_EACH * (len(variants) + len(headings)),
        around=150,
        gap=0,
        horizontal_spacing=0.03 if len(ways) > 1 else 0,
        x_title=METRICS[metric],
    )
    listed: set[str] = set()
    for way, place in zip(ways, places, strict=True):
        part: Any = patched[patched["scale_from"] == way]
        y = [heights[key] for key in zip(part["ablation"], part["variant"], strict=True)]
        part = part.assign(y=y).sort_values("y")
        for name, column, colour, dash in (
            ("unpatched", "unpatched", _UNPATCHED, "solid"),
            ("whole map", "whole", _WHOLE, "dot"),
        ):
            trace = _line(part, name, column, colour, dash)
            trace.showlegend = name not in listed
            listed.add(name)
            figure.add_trace(trace, **place)
        for kind in MAPS:
            rows: Any = part[part["map"] == kind]
            if len(rows):
                figure.add_trace(_dots(rows, kind), **place)
    _label(figure, heights, headings, len(ways))
    most = int(frame["n_tasks"].max())
    tasks = f"mean over {most} tasks" if most > 1 else "1 task"
    known = bool(frame["low"].notna().any())
    subtitle = " · ".join(
        [
            plotly_text(str(frame["model"].iloc[0])),
            tasks,
            f"{int(frame['n_questions'].max())} questions",
            f"{100 * level:g} % intervals" if known else "no single questions, so no intervals",
        ]
    )
    finish(
        figure,
        layout,
        above=(84, 106),
        subtitle=subtitle,
        plot_bgcolor=None,
        margin={"l": 206, "r": 16, "b": 52},
    )
    axes = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1 + 24 / max(axes, 1), "yanchor": "bottom"}
    )
    if metric != "logit_diff":
        figure.update_xaxes(range=[-0.03, 1.03])
    return figure


def _problem(frame: pd.DataFrame) -> str | None:
    missing = [name for name in _NEEDED if name not in frame]
    return problem_of(frame, missing[:1] or ["ablation", "variant", "value"])


def _heights(
    variants: list[tuple[str, str]],
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Give the row of each variant, from the top, and those of the headings above groups."""
    heights: dict[tuple[str, str], float] = {}
    headings: dict[str, float] = {}
    at = 0.0
    for ablation, variant in variants:
        if ablation not in headings and ablation != "whole":
            headings[ablation] = at + 0.3
            at += 1.2
        heights[ablation, variant] = at
        at += 1
    return heights, headings


def _line(part: Any, name: str, column: str, colour: str, dash: str) -> go.Scatter:
    """Draw through all rows what lies beside them, as a step where it is another."""
    x: list[float | None] = []
    y: list[float | None] = []
    for value, at in zip(part[column].tolist(), part["y"].tolist(), strict=True):
        if x and x[-1] is not None and abs(x[-1] - value) > 1e-9:
            x.append(None)
            y.append(None)
        x += [value, value]
        y += [at - 0.6, at + 0.6]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=name,
        legendgroup=name,
        line={"color": colour, "width": 1.4, "dash": dash},
        hovertemplate=f"{name} %{{x:.3g}}<extra></extra>",
    )


def _dots(rows: Any, kind: str) -> go.Scatter:
    name, colour, symbol = MAPS[kind]
    value = rows["value"].to_numpy(float)
    low, high = (rows[end].fillna(rows["value"]).to_numpy(float) for end in ("low", "high"))
    scales = [
        scale_name(one) if one == other else f"{scale_name(one)} to {scale_name(other)}"
        for one, other in zip(rows["scale_low"], rows["scale_high"], strict=True)
    ]
    columns = zip(low, high, scales, rows["kl"], rows["n_tasks"], strict=True)
    return go.Scatter(
        x=value,
        y=rows["y"].to_numpy(float),
        mode="markers",
        name=name,
        showlegend=False,
        text=[plotly_text(variant) for variant in rows["variant"]],
        customdata=[
            [short(one[0]), short(one[1]), one[2], f"{one[3]:.2g}", one[4]] for one in columns
        ],
        marker={"symbol": symbol, "color": colour, "size": 8},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - value,
            "arrayminus": value - low,
            "color": colour,
            "thickness": 1.4,
            "width": 0,
        },
        hovertemplate=(
            f"<b>%{{text}}</b> ({name}), scale %{{customdata[2]}}<br>%{{x:.3g}} "
            "[%{customdata[0]}, %{customdata[1]}]<br>unrelated text: %{customdata[3]} nats per "
            "token<br>%{customdata[4]} tasks<extra></extra>"
        ),
    )


def _label(
    figure: Any,
    heights: dict[tuple[str, str], float],
    headings: dict[str, float],
    n_panels: int,
) -> None:
    last = max(heights.values())
    figure.update_yaxes(
        range=[last + 0.8, -0.8],
        tickmode="array",
        tickvals=list(heights.values()),
        ticktext=[plotly_text(variant) for _, variant in heights],
        zeroline=False,
        showgrid=False,
    )
    for i in range(n_panels):
        figure.update_yaxes(showticklabels=i == 0, row=1, col=i + 1)
    for ablation, at in headings.items():
        figure.add_annotation(
            text=f"<b>{_GROUPS.get(ablation, plotly_text(ablation))}</b>",
            x=0,
            xref="paper",
            xanchor="right",
            xshift=-6,
            y=at,
            yref="y",
            showarrow=False,
            font={"size": 12},
        )
    figure.update_xaxes(showgrid=True, zeroline=False, showticklabels=True)
