"""The picture of the README: one head of a real model, its attention beside −R for two answers.

    python examples/readme_picture.py

Of all heads the one with the largest norm for the first answer is drawn. Needs the real model (the
README's "Try it" installs it), kaleido (`pip install -e ".[images]"`) and a Chrome or Chromium. The
background is white, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plotly.subplots import make_subplots

from ra_lens import load_model, run_with_ra
from ra_lens.figures import head_map, save_figure
from ra_lens.text import label

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "italy.png"
PROMPT = "I like Italy and France. I visited the city of"
ANSWERS = (" Paris", " Rome")
IN_FRONT = "<|endoftext|>"  # this model's BOS is a token of chats


def main() -> None:
    model, prompts = load_model("smollm2-135m"), [PROMPT] * len(ANSWERS)
    _, ra = run_with_ra(model, prompts, target=list(ANSWERS), prepend_bos=IN_FRONT)
    (head,) = ra.apply_slice_to_batch_dim(0).top_heads(1)
    panels: list[tuple[str, Any]] = [
        (f"{head.label}: attention A", head_map(ra, head, kind="pattern"))
    ]
    for example, answer in enumerate(ANSWERS):
        chance = (-ra.loss[example]).exp().item()
        title = f"−R for “{label(answer)}”, p = {chance:.2g}"
        panels.append((title, head_map(ra, head, example=example)))
    save_figure(side_by_side(panels), PICTURE, width=1000, scale=1.5)
    print(f"wrote {PICTURE}")


def side_by_side(panels: list[tuple[str, Any]]) -> Any:
    """Draw maps with the same tokens in one row, each with its scale below."""
    gap = 0.025
    figure = make_subplots(
        cols=len(panels), horizontal_spacing=gap, subplot_titles=[title for title, _ in panels]
    )
    figure.update_annotations(font_size=13)
    for col, (_, panel) in enumerate(panels, start=1):
        for trace in panel.data:
            axes = figure.get_subplot(1, col)
            low, high = axes.xaxis.domain
            where = {"x": (low + high) / 2, "len": high - low, "y": -0.42, "yanchor": "top"}
            trace.colorbar.update(orientation="h", xanchor="center", **where)
            trace.colorbar.title.side = "bottom"
            figure.add_trace(trace, row=1, col=col)
        keep = ("type", "showgrid", "zeroline", "tickmode", "tickvals", "ticktext", "tickangle")
        for name, axis in (("xaxis", panel.layout.xaxis), ("yaxis", panel.layout.yaxis)):
            like = {key: axis[key] for key in keep if axis[key] is not None}
            like["tickfont"] = {"size": 11}
            change = figure.update_xaxes if name == "xaxis" else figure.update_yaxes
            change(**like, row=1, col=col)
        figure.update_yaxes(autorange="reversed", showticklabels=col == 1, row=1, col=col)
    return figure.update_layout(
        template="plotly_white",
        plot_bgcolor=panels[0][1].layout.plot_bgcolor,
        font={"size": 12},
        height=425,
        margin={"l": 95, "r": 12, "t": 30, "b": 155},
    )


if __name__ == "__main__":
    main()
