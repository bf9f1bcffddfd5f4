"""How well ranking methods foretell what taking one head away does: a row for each method."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput, one_of
from ra_lens.figures.style import (
    Layout,
    check_frame,
    finish,
    method_styles,
    panels,
    plotly_text,
)
from ra_lens.text import short, shots_name

Measure = Literal["spearman_signed", "spearman_abs"]

_NEEDED = ("model", "task", "n_shots", "method", "ablation", *get_args(Measure))
_MEASURES: dict[Measure, tuple[str, str, str]] = {
    "spearman_signed": ("ρ with the effect", "cross_half_signed", "effects_split_half_signed"),
    "spearman_abs": ("ρ with its size", "cross_half_abs", "effects_split_half_abs"),
}
_ABLATIONS = {"zero": "head zeroed", "mean": "head at its mean", "resample": "head resampled"}
_LINE, _EACH = "#4b5563", 21


def method_agreement(
    frame: pd.DataFrame, *, measure: Measure | None = None, **layout: Unpack[Layout]
) -> go.Figure:
    """Draw Spearman's ρ between each method's scores and the exact effects of taking a head away.

    A panel for each ablation and measure, a row for each method, best first by the mean of the
    first panel. The large marker is the mean over tasks and numbers of demonstrations, of effects
    on the same prompts as the scores; the small ones are the cells; of a single one there is its
    interval. The open marker is what scores on half of the prompts tell of the effects on the
    others. It may be compared with the dotted line, what the effects on one half tell of those on
    the other; the large marker may not.

    Args:
        frame: From `faithfulness_test` or `faithfulness`, of one model.
        measure: One of the two measures. Default: both.
        **layout: `title`, above the figure (default: a line that says what is shown); `width` and
            `height` in pixels (default: as wide as its container, and by the number of methods);
            `template` of plotly, for this figure only.

    Returns:
        A figure with, per panel, a trace `each` whose `text` names task and demonstrations, and a
        trace `mean`, whose `y` are the methods from the top and `x` the values; of a frame that
        has them, traces `other half`, likewise, and `split-half of the effects`.

    Raises:
        BadInput: not such a frame, several models in it, or an unknown measure.
    """
    cell = ("task", "n_shots", "method", "ablation")
    check_frame(frame, what="faithfulness_test()", columns=_NEEDED, cell=cell)
    if measure is not None:
        one_of("measure", measure, get_args(Measure))
    measures: list[Measure] = list(_MEASURES) if measure is None else [measure]
    ablations = [name for name in _ABLATIONS if name in set(frame["ablation"])]
    if not ablations:
        raise BadInput(f"found ablations {sorted(set(frame['ablation']))}; none is known.")
    kinds: list[tuple[str, Measure]] = [(a, one) for a in ablations for one in measures]
    first: Any = frame[frame["ablation"] == ablations[0]]
    means = first.groupby("method")[measures[0]].mean().sort_values(ascending=False)
    names = [str(name) for name in means.index]
    styles = method_styles(names)
    figure, places = panels(
        [f"{_ABLATIONS[ablation]}: {_MEASURES[one][0]}" for ablation, one in kinds],
        layout,
        columns=2 if len(kinds) > 1 else 1,
        each=_EACH * len(names) + 16,
        around=140,
        gap=56,
        horizontal_spacing=0.04 if len(kinds) > 1 else 0,
    )
    for (ablation, one), place in zip(kinds, places, strict=True):
        part: Any = frame[frame["ablation"] == ablation]
        for trace in _traces(part, one, names, styles):
            figure.add_trace(trace, **place)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=[styles[name].name for name in names],
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(showgrid=True, zeroline=True, zerolinecolor="#9ca3af", range=[-0.72, 1.04])
    n_cells = len(frame[["task", "n_shots"]].drop_duplicates())
    n_prompts = sorted({int(n) for n in frame["n_prompts"]}) if "n_prompts" in frame else []
    of = f" of {' or '.join(map(str, n_prompts))} prompts" if n_prompts else ""
    subtitle = (
        f"{plotly_text(str(frame['model'].iloc[0]))} · "
        f"{n_cells} {'cell' if n_cells == 1 else 'cells'} (task and examples){of}"
    )
    if any(trace.name == "other half" for trace in figure.data):
        subtitle += (
            "<br>filled: effects on the same prompts · open: scores of one half, effects on the "
            "other · dotted: effects of one half and of the other"
        )
    finish(
        figure,
        layout,
        above=(84, 106),
        subtitle=subtitle,
        plot_bgcolor=None,
        margin={"l": 8, "r": 16, "b": 36},
        showlegend=False,
    )
    return figure


def _traces(
    part: Any, measure: Measure, names: list[str], styles: dict[str, Any]
) -> list[go.Scatter]:
    """The cells, their means and what is told of the other half, of one panel."""
    at = {name: i for i, name in enumerate(names)}
    part = part[part["method"].isin(names)]
    means = part.groupby("method")[measure].mean().reindex(names)
    colours = [styles[name].colour for name in names]
    shown = [plotly_text(styles[name].name) for name in names]
    single = len(part) == len(names)
    traces: list[go.Scatter] = []
    _, across, effects = _MEASURES[measure]
    if effects in part and bool(part[effects].notna().any()):
        value = float(part.groupby(["task", "n_shots"])[effects].first().mean())
        traces.append(
            go.Scatter(
                x=[value, value],
                y=[-0.6, len(names) - 0.4],
                mode="lines",
                name="split-half of the effects",
                line={"color": _LINE, "width": 1.4, "dash": "dot"},
                hovertemplate=f"the effects' own split-half ρ: {short(value)}<extra></extra>",
            )
        )
    if not single:
        traces.append(
            go.Scatter(
                x=part[measure].tolist(),
                y=[at[name] for name in part["method"]],
                mode="markers",
                name="each",
                text=[
                    plotly_text(f"{task}, {shots_name(int(shots))}")
                    for task, shots in zip(part["task"], part["n_shots"], strict=True)
                ],
                marker={
                    "size": 5,
                    "opacity": 0.45,
                    "color": [styles[name].colour for name in part["method"]],
                },
                hovertemplate="%{text}: ρ %{x:.2f}<extra></extra>",
            )
        )
    symbols = [styles[name].symbol.removesuffix("-open") for name in names]
    if across in part and bool(part[across].notna().any()):
        traces.append(
            go.Scatter(
                x=part.groupby("method")[across].mean().reindex(names).tolist(),
                y=[at[name] for name in names],
                mode="markers",
                name="other half",
                text=shown,
                marker={
                    "size": 9,
                    "symbol": [f"{symbol}-open" for symbol in symbols],
                    "color": colours,
                    "line": {"width": 1.6},
                },
                hovertemplate="<b>%{text}</b>, the other half: ρ %{x:.2f}<extra></extra>",
            )
        )
    interval: dict[str, Any] = {}
    if single and f"{measure}_low" in part:
        ends = part.set_index("method").reindex(names)
        interval = {
            "type": "data",
            "symmetric": False,
            "array": (ends[f"{measure}_high"] - means).clip(lower=0).tolist(),
            "arrayminus": (means - ends[f"{measure}_low"]).clip(lower=0).tolist(),
            "thickness": 1.2,
            "width": 0,
            "color": _LINE,
        }
    traces.append(
        go.Scatter(
            x=means.tolist(),
            y=[at[name] for name in names],
            mode="markers",
            name="mean",
            text=shown,
            error_x=interval or None,
            marker={
                "size": 10,
                "symbol": symbols,
                "color": colours,
                "line": {"width": 1, "color": "white"},
            },
            hovertemplate="<b>%{text}</b>: ρ %{x:.2f}<extra></extra>",
        )
    )
    return traces
