"""`ra-lens compare-methods`: which way to rank heads foretells what taking one away does.

What it computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import some_of, whole_numbers
from ra_lens.cli.setup import Setup, with_setup

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from ra_lens.tasks import Task


@with_setup
def compare_methods(
    setup: Setup,
    *,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Ways to rank heads. Default: all that cost a few passes, and the exact; but for "
            "relp and gim, which not every model has rules for."
        ),
    ] = None,
    ablations: Annotated[
        list[str] | None,
        typer.Option(
            help="What a head gives when it is taken away: zero, mean, resample (what it gives on "
            "the question's corrupted twin). Default: zero resample."
        ),
    ] = None,
    n_rank: Annotated[
        int, typer.Option(min=2, help="Prompts on which heads are scored and taken away.")
    ] = 12,
    ks: Annotated[
        list[str] | None,
        typer.Option("--k", help="Numbers of heads at which precision is taken. Default: 10 20."),
    ] = None,
    answer_in_input: opt.AnswerOption = True,
) -> None:
    """Take every head away, and show which ranking foretold best what that does."""
    from ra_lens.cli import show_methods as show
    from ra_lens.experiments import faithfulness, head_effect_table
    from ra_lens.experiments.faithfulness import COMPARED
    from ra_lens.heads.ablation import ABLATIONS
    from ra_lens.heads.agreement import Summary
    from ra_lens.model import as_lens
    from ra_lens.report.experiments import write_methods_page

    setup.shots = setup.shots or ["1", "5"]
    counts = [10, 20] if ks is None else whole_numbers(ks, "--k")
    given = ["zero", "resample"] if ablations is None else ablations
    summary = Summary.read(counts, seed=setup.seed)

    def table(model: nn.Module, tasks: list[Task], **options: Any) -> pd.DataFrame:
        summary.refuse_all_of(sum(as_lens(model).sites.n_heads))
        return head_effect_table(model, tasks, **options)

    frame = setup.run(
        table,
        methods=list(COMPARED) if methods is None else methods,
        ablations=some_of(given, "--ablations", ABLATIONS),
        n_rank=n_rank,
        answer_in_input=answer_in_input,
    )
    found = faithfulness(frame, **vars(summary))
    setup.tell(
        found,
        facts=lambda: show.faithfulness_facts(found),
        text=lambda: show.print_faithfulness(found, counts),
        draw=lambda path: write_methods_page(found, path),
    )
