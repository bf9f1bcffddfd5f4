"""`ra-lens circuits`: how well rankings find the heads of a known circuit.

What it computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import read_batch_size, split_values
from ra_lens.files import check_output, user_path


def circuits(
    circuit: Annotated[
        Literal["ioi", "greater_than", "induction"],
        typer.Option(help="What the prompts ask for."),
    ] = "ioi",
    model: opt.ModelOption = opt.DEMO,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            help="The true heads: found (in this model, by exact patching and attention; the "
            "default), published (of GPT-2 small), or labels: L9H9 L10H0."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Ways to rank heads. Default: all but those that need solved examples."),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", min=2, help="Prompts; half of them find heads, half rank.")
    ] = 100,
    top: Annotated[
        int, typer.Option(min=1, help="Heads to be found: how many of the largest effects count.")
    ] = 10,
    attention: Annotated[
        float,
        typer.Option(help="Heads to be found: least share of attention on what they have to see."),
    ] = 0.3,
    random_orders: Annotated[int, typer.Option(min=1, help="How many random orders to draw.")] = 20,
    answer_in_input: opt.AnswerOption = True,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the random orders.")] = 0,
    bos: opt.BosOption = None,
    no_bos: opt.NoBosOption = False,
    batch_size: opt.BatchSizeOption = "64",
    device: opt.DeviceOption = None,
    kind: opt.KindOption = None,
    allow_pickle: opt.PickleOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Results file, .parquet or .csv. The same command goes on where it was killed.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    debug: opt.DebugOption = False,
) -> None:
    """Say how well rankings find the heads of a known circuit, by AUROC and precision."""
    from ra_lens.cli import session
    from ra_lens.cli import show_results as show
    from ra_lens.experiments.circuits import CIRCUIT_METHODS, circuit_test
    from ra_lens.experiments.runner import read_methods
    from ra_lens.memory import offering
    from ra_lens.tables import TABLE

    session.prepare(model, device)
    if out is not None:
        out = user_path(out)
        check_output(out, TABLE)
    names = CIRCUIT_METHODS if methods is None else split_values(methods, "--methods")
    names = read_methods(names)
    true = ["found"] if heads is None else split_values(heads, "--heads")
    front, size = session.read_bos(bos, no_bos=no_bos), read_batch_size(batch_size)
    loaded = session.load(model, kind, device, debug=debug, allow_pickle=allow_pickle)
    with session.quiet(debug=debug), offering("batch_size", typed=True):
        frame = circuit_test(
            loaded,
            circuit,
            methods=names,
            heads=true[0] if true in (["found"], ["published"]) else true,
            n=n,
            top=top,
            attention=attention,
            random_orders=random_orders,
            answer_in_input=answer_in_input,
            seed=seed,
            prepend_bos=front,
            batch_size=size,
            out=out,
            progress=not quiet,
        )
    if as_json:
        show.print_circuit_json(frame, out=out)
        return
    show.print_circuit(frame)
    show.print_files(out)
