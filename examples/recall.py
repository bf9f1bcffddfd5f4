"""Where a fact comes from: the last token's attention cut, window by window of layers.

    python examples/recall.py                            # SmolLM2-135M-Instruct
    python examples/recall.py --prompt "The capital of Japan is the city of" --target " Tokyo" \
        --subject Japan

The experiment of Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive
Language Models" (2023): what the last token reads from the subject, from the other tokens, and from
the token in front is cut in a window of layers, and the loss is read. Beside it what is foretold:
from one backward pass, and by following the cut in three steps (a forward and a backward pass each,
`amount` of `knockout_hooks`, Gauss's rule).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import torch
import typer
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens import RACache, knockout_hooks, load_model, run_with_ra
from ra_lens.figures.style import finish
from ra_lens.knockouts import EdgeSet
from ra_lens.model import as_lens

GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
COLOURS = ("#d55e00", "#0072b2", "#4b5563")


def windows(
    model: nn.Module, ra: RACache, ids: Tensor, target: int, subject: str, width: int
) -> pd.DataFrame:
    """One row per source of the last token's attention and window of layers.

    Args:
        model: The model.
        ra: Maps of the prompt, for the target.
        ids: The token ids that were run, `[1, pos]`.
        target: The token that the loss asks for.
        subject: The text of the subject.
        width: Layers of a window.
    """
    cut = _cutter(model, ids, target)
    of_subject = set(ra.edges(keys=subject).rows[0][0].keys.some)
    front = {0} if ra.info.prepended else set[int]()
    others = set(range(ids.shape[1] - 1)) - of_subject - front
    sources = {"the subject": of_subject, "other tokens": others, "the token in front": front}
    frames: list[pd.DataFrame] = []
    for name, keys in sources.items():
        if not keys:
            continue
        first = range(len(ra.layers) - width + 1)
        sets = [ra.edges(queries=-1, keys=sorted(keys), layers=range(i, i + width)) for i in first]
        follow = [weight * cut(sets, at, slope=True) for at, weight in GAUSS]
        columns = {
            "source": name,
            "layer": [i + (width - 1) / 2 for i in first],
            "done": (cut(sets, 1.0) - cut(sets, 0.0)).tolist(),
            "one backward pass": [float(ra.knockout(edges=one)) for one in sets],
            "three steps": torch.stack(follow).sum(dim=0).tolist(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _cutter(model: Any, ids: Tensor, target: int) -> Callable[..., Float[Tensor, "some"]]:
    """Loss under each set, cut by some part, or its slope in that part."""

    def cut(sets: list[EdgeSet], amount: float, *, slope: bool = False) -> Tensor:
        part = torch.full((len(sets),), amount, requires_grad=slope)
        hooks = knockout_hooks(model, sets, amount=part)
        with torch.set_grad_enabled(slope), model.hooks(fwd_hooks=hooks):
            logits: Tensor = model(ids.expand(len(sets), -1), return_type="logits")
            loss = -logits[:, -1].log_softmax(dim=-1)[:, target]
        return torch.autograd.grad(loss.sum(), part)[0] if slope else loss

    return cut


def draw(frame: pd.DataFrame, title: str, width: int) -> go.Figure:
    """The loss that each window costs, done and foretold."""
    figure = go.Figure()
    dashes = {"done": "solid", "three steps": "dash", "one backward pass": "dot"}
    for colour, (source, part) in zip(COLOURS, frame.groupby("source", sort=False), strict=False):
        for what, dash in dashes.items():
            figure.add_trace(
                go.Scatter(
                    x=part["layer"],
                    y=part[what],
                    name=f"{source}, {what}",
                    line={"color": colour, "dash": dash, "width": 2.5 if what == "done" else 1.5},
                )
            )
    finish(
        figure,
        {"width": 1000, "title": title},
        height=440,
        above=(40, 70),
        subtitle=f"the last token’s attention cut in {width} layers, all heads",
        plot_bgcolor=None,
        margin={"l": 72, "r": 20, "b": 58},
        legend={"x": 1.01, "y": 1},
    )
    figure.update_xaxes(title="middle layer of the window")
    figure.update_yaxes(title="change of −log p(target), nats", zeroline=True)
    return figure


def main(
    model: Annotated[str, typer.Option(help="As load_model takes it.")] = "smollm2-135m",
    prompt: Annotated[str, typer.Option()] = "The official language of Brazil is",
    target: Annotated[str, typer.Option()] = " Portuguese",
    subject: Annotated[str, typer.Option()] = "Brazil",
    front: Annotated[str, typer.Option(help="The token in front.")] = "<|endoftext|>",
    width: Annotated[int, typer.Option(help="Layers of a window.")] = 5,
    out: Annotated[Path | None, typer.Option("-o", help="A figure, .png or .html.")] = None,
) -> None:
    """Print the windows that cost most, and draw them all."""
    loaded = load_model(model)
    lens = as_lens(loaded)
    _, ra = run_with_ra(loaded, prompt, target=target, prepend_bos=front, progress=False)
    print(ra)
    print(ra.top_edges(5))
    ids = torch.tensor([lens.encode(prompt, prepend_bos=front)])
    (answer, *_) = lens.encode(target, prepend_bos=False)
    frame = windows(loaded, ra, ids, answer, subject, width)
    worst = frame.loc[frame.groupby("source", sort=False).done.idxmax()]
    print(worst.round(2).to_string(index=False))
    wanted = frame[["done", "one backward pass", "three steps"]].corr("spearman")["done"]
    print(f"Spearman, {len(frame)} windows: {wanted.drop('done').round(2).to_dict()}")
    if out is not None:
        figure = draw(frame, f"{prompt} →{target}", width)
        if out.suffix == ".html":
            figure.write_html(out)
        else:
            figure.write_image(out, scale=1.25)


if __name__ == "__main__":
    typer.run(main)
