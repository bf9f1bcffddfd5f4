"""`ra-lens rank`, `perturb`, `patch` and `compare`: the paper's experiments, one command each.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import Command
from ra_lens.cli.many_values import ManyValuesCommand
from ra_lens.cli.options import reported


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (rank, perturb, patch):
        app.command(cls=ManyValuesCommand)(command)
    app.command(cls=Command)(compare)


def rank(
    task: opt.TaskOption,
    model: opt.ModelOption = "demo",
    source: opt.SourceOption = "builtin",
    shots: opt.ShotsOption = None,
    methods: opt.MethodsOption = None,
    n_rank: opt.NRankOption = 25,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list.")] = 8,
    answer_in_input: opt.AnswerOption = True,
    seed: opt.SeedOption = 0,
    split: opt.SplitOption = opt.Split.CODE,
    separator: opt.SeparatorOption = None,
    natural: opt.NaturalOption = opt.Natural.TEMPLATE,
    bos: opt.BosOption = None,
    batch_size: opt.BatchOption = 64,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = opt.DType.FLOAT32,
    kind: opt.KindOption = None,
    out: opt.OutOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Rank a model's attention heads for tasks, by each method: larger score, more important."""
    with reported(debug=debug):
        from ra_lens.cli import experiment_runs as runs

        setup = runs.Setup(
            model, task, source, shots, seed, split.value, separator, natural.value, bos,
            batch_size, device, dtype.value, None if kind is None else kind.value,
            opt.written_to(out), None,
            as_json, quiet, debug,
        )  # fmt: skip
        runs.rank(setup, methods=methods, n_rank=n_rank, answer_in_input=answer_in_input, top=top)


def perturb(
    task: opt.TaskOption,
    model: opt.ModelOption = "demo",
    source: opt.SourceOption = "builtin",
    shots: opt.ShotsOption = None,
    methods: opt.MethodsOption = None,
    n_rank: opt.NRankOption = 25,
    rank_shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples in ranking prompts. Default: as in questions."),
    ] = None,
    n_test: opt.NTestOption = None,
    step: Annotated[float, typer.Option(help="Share of the heads unmasked at a time.")] = 0.1,
    random_orders: Annotated[int, typer.Option(min=1, help="How many random orders to draw.")] = 20,
    accuracy: opt.AccuracyOption = opt.Accuracy.FIRST_TOKEN,
    metric: opt.MetricOption = opt.Metric.TOP1,
    auc_rule: opt.AucRuleOption = opt.AucRule.TRAPEZOID,
    answer_in_input: opt.AnswerOption = True,
    seed: opt.SeedOption = 0,
    split: opt.SplitOption = opt.Split.CODE,
    separator: opt.SeparatorOption = None,
    natural: opt.NaturalOption = opt.Natural.TEMPLATE,
    bos: opt.BosOption = None,
    batch_size: opt.BatchOption = 64,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = opt.DType.FLOAT32,
    kind: opt.KindOption = None,
    out: opt.OutOption = None,
    figure: opt.FigureOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Zero all heads, unmask them in each method's order, and show the areas under the curves."""
    with reported(debug=debug):
        from ra_lens.cli import experiment_runs as runs

        setup = runs.Setup(
            model, task, source, shots, seed, split.value, separator, natural.value, bos,
            batch_size, device, dtype.value, None if kind is None else kind.value,
            opt.written_to(out), opt.written_to(figure),
            as_json, quiet, debug,
        )  # fmt: skip
        runs.perturb(
            setup,
            methods=methods,
            n_rank=n_rank,
            rank_shots=rank_shots,
            n_test=n_test,
            step=step,
            random_orders=random_orders,
            accuracy=accuracy.value,
            metric=metric.value,
            rule=auc_rule.value,
            answer_in_input=answer_in_input,
        )


def patch(
    task: opt.TaskOption,
    model: opt.ModelOption = "demo",
    source: opt.SourceOption = "builtin",
    shots: opt.ShotsOption = None,
    scales: Annotated[
        list[str] | None,
        typer.Option(help="Factors of the added maps: -30 1. Default: the paper's 24, 3 to -120."),
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option(help="Maps to add: ra, pattern. Default: both.")
    ] = None,
    n_mean: Annotated[int, typer.Option(min=1, help="Questions whose maps are averaged.")] = 25,
    n_test: opt.NTestOption = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of question and answer. Default: the most frequent."),
    ] = None,
    at_least: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs of one length needed. Default: 100; builtin tasks: 40."),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the answers, with their leading space.")
    ] = 1,
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Keep every row of the pattern a distribution.")
    ] = False,
    at: Annotated[
        opt.Where, typer.Option(help="What maps are added to: the pattern, or the scores.")
    ] = opt.Where.PATTERN,
    accuracy: opt.AccuracyOption = opt.Accuracy.FIRST_TOKEN,
    metric: opt.MetricOption = opt.Metric.TOP1,
    seed: opt.SeedOption = 0,
    split: opt.SplitOption = opt.Split.CODE,
    separator: opt.SeparatorOption = None,
    natural: opt.NaturalOption = opt.Natural.TEMPLATE,
    bos: opt.BosOption = None,
    batch_size: opt.BatchOption = 64,
    device: opt.DeviceOption = None,
    dtype: opt.DTypeOption = opt.DType.FLOAT32,
    kind: opt.KindOption = None,
    out: opt.OutOption = None,
    figure: opt.FigureOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Add scaled mean maps to the attention of other questions; show what the model then does."""
    with reported(debug=debug):
        from ra_lens.cli import experiment_runs as runs

        setup = runs.Setup(
            model, task, source, shots, seed, split.value, separator, natural.value, bos,
            batch_size, device, dtype.value, None if kind is None else kind.value,
            opt.written_to(out), opt.written_to(figure),
            as_json, quiet, debug,
        )  # fmt: skip
        runs.patch(
            setup,
            scales=scales,
            kinds=kinds,
            n_mean=n_mean,
            n_test=n_test,
            length=length,
            at_least=at_least,
            answer_tokens=answer_tokens,
            renormalise=renormalise,
            at=at.value,
            accuracy=accuracy.value,
            metric=metric.value,
        )


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
    metric: opt.MetricOption = opt.Metric.TOP1,
    auc_rule: opt.AucRuleOption = opt.AucRule.TRAPEZOID,
    every: Annotated[
        bool, typer.Option("--all", help="Also list the cells that are on one side only.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write every cell: .parquet or .csv.")
    ] = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Lay results next to the paper's numbers, cell by cell, with the difference."""
    with reported(debug=debug):
        from ra_lens.cli import experiment_runs as runs

        runs.compare(
            results,
            paper,
            as_model=as_model,
            metric=metric.value,
            rule=auc_rule.value,
            every=every,
            out=opt.written_to(out),
            as_json=as_json,
        )
