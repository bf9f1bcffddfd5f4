"""`ra-lens compare`: results next to the paper's numbers.

What it computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from ra_lens.cli import options as opt
from ra_lens.files import check_output, user_path


def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Files that ra-lens perturb and patch wrote.")
    ],
    paper: Annotated[
        Path, typer.Option(help="Folder with the published numbers, table1.csv and so on.")
    ],
    as_model: Annotated[
        str | None,
        typer.Option(help="Lay the results beside this model of the paper, such as GPT2-xl."),
    ] = None,
    metric: opt.MetricOption = "top1",
    auc_rule: opt.AucRuleOption = "trapezoid",
    every: Annotated[
        bool, typer.Option("--all", help="Also list the cells that are on one side only.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write every cell: .parquet or .csv.")
    ] = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,  # noqa: ARG001 read by `Command`
) -> None:
    """Lay results next to the paper's numbers, cell by cell, with the difference."""
    from ra_lens.cli import show_results as show
    from ra_lens.cli.session import warn
    from ra_lens.experiments import read_results, write_results
    from ra_lens.experiments.paper import compare_with_paper, paper_tables
    from ra_lens.tables import TABLE

    if out is not None:
        out = user_path(out)
        check_output(out, TABLE, inputs=[*map(user_path, results), *paper_tables(paper)])
    frames = [read_results(path, measures=[metric]) for path in results]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compared = compare_with_paper(
            frames, paper, as_model=as_model, metric=metric, rule=auc_rule
        )
    for warning in caught:
        warn("warning", str(warning.message))
    if out is not None:
        write_results(compared, out)
    if as_json:
        show.print_comparison_json(compared, out=out)
    else:
        show.print_comparison(compared, every=every)
        show.print_files(out)
