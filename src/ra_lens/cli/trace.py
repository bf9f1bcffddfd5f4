"""`ra-lens trace`: paths of attention from a token back to where it came from.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.options import reported


class Followed(str, Enum):
    """What paths follow, as choices of `--follow`."""

    PATTERN = "pattern"
    VALUE_NORM = "value_norm"
    MORE = "more"
    LESS = "less"
    ABS = "abs"


class Search(str, Enum):
    """How paths are searched, as choices of `--search`."""

    EXACT = "exact"
    BEAM = "beam"


def trace(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to run on; - reads standard input.")
    ],
    model: opt.ModelOption = "demo",
    target_pos: Annotated[
        int, typer.Option(help="Position to begin at; negative: from the end.")
    ] = -1,
    layer: Annotated[
        str, typer.Option(help="One layer (negative: from the end), or all: through all layers.")
    ] = "all",
    follow: Annotated[
        Followed | None,
        typer.Option(
            help="pattern: attention; value_norm: times the norm of what heads write; more, less, "
            "abs: where descent wants more or less attention, or both. "
            "Default: value_norm through all layers, pattern in one."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="For more, less and abs: what the loss asks for."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of paths.")] = 5,
    search: Annotated[
        Search, typer.Option(help="exact: the best there are; beam: what beam search finds.")
    ] = Search.EXACT,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Only so many steps from each token. One layer.")
    ] = None,
    min_attn: Annotated[
        float, typer.Option(help="Only steps of at least this weight. One layer.")
    ] = 0.0,
    agg_heads: Annotated[
        str, typer.Option(help="Heads by mean, by max, or one: 3 or L2H3. One layer.")
    ] = "mean",
    length_norm: Annotated[
        str, typer.Option(help="none, avg_logprob, sqrt or pow:0.7. One layer.")
    ] = "none",
    residual: Annotated[
        float | None,
        typer.Option(help="Share of the residual connection. All layers. Default: measured."),
    ] = None,
    escapes: Annotated[
        bool,
        typer.Option("--escapes", "-e", help=r"Read \n and \t in prompt and target as whitespace."),
    ] = False,
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    as_json: opt.JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also draw the paths: one self-contained HTML file."),
    ] = None,
    debug: opt.DebugOption = False,
) -> None:
    """Trace where a token got what it has: the best paths of attention, backwards."""
    with reported(debug=debug):
        from ra_lens.cli.tracing import Options, run_trace

        run_trace(
            Options(
                prompt=prompt,
                model=model,
                target_pos=target_pos,
                layer=layer,
                follow=None if follow is None else follow.value,
                target=target,
                top=top,
                search=search.value,
                top_k=top_k,
                min_attn=min_attn,
                agg_heads=agg_heads,
                length_norm=length_norm,
                residual=residual,
                escapes=escapes,
                kind=None if kind is None else kind.value,
                device=device,
                as_json=as_json,
                output=output,
                debug=debug,
            )
        )
