"""`ra-lens rank`, `perturb`, `patch`, `ablate-patch`, `knockout`: one experiment each.

What a command computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import numbers, some_of, split_values, whole_numbers
from ra_lens.cli.setup import Setup, with_setup
from ra_lens.errors import BadInput

if TYPE_CHECKING:
    from ra_lens.questions import Accuracy

_ACCURACIES: dict[str, Accuracy] = {"first-token": "first token", "answer": "answer"}


@partial(with_setup, without=["figure"])
def rank(
    setup: Setup,
    *,
    methods: opt.MethodsOption = None,
    n_rank: opt.NRankOption = 25,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list.")] = 8,
    answer_in_input: opt.AnswerOption = True,
) -> None:
    """Rank a model's attention heads for tasks, by each method: larger score, more important."""
    from ra_lens.cli import show_results as show
    from ra_lens.experiments import rank_tasks

    frame = setup.run(rank_tasks, methods=methods, n_rank=n_rank, answer_in_input=answer_in_input)
    setup.tell(
        frame,
        facts=lambda: show.ranking_facts(frame, top=top),
        text=lambda: show.print_ranking(frame, top=top),
    )


@with_setup
def perturb(
    setup: Setup,
    *,
    methods: opt.MethodsOption = None,
    n_rank: opt.NRankOption = 25,
    rank_shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples in ranking prompts. Default: as in questions."),
    ] = None,
    n_test: opt.NTestOption = None,
    step: Annotated[float, typer.Option(help="Share of the heads unmasked at a time.")] = 0.1,
    heads_kept: Annotated[
        list[str] | None,
        typer.Option(help="Instead of --step, numbers of heads unmasked: 1 2 3 5 8."),
    ] = None,
    others: Annotated[
        Literal["zero", "resample", "mean"],
        typer.Option(
            help="What masked heads get: zero; what they give on another question, as long, with "
            "another answer (resample); or what they give on average (mean)."
        ),
    ] = "zero",
    random_orders: Annotated[int, typer.Option(min=1, help="How many random orders to draw.")] = 20,
    each_question: opt.EachQuestionOption = False,
    accuracy: opt.AccuracyOption = "first-token",
    metric: opt.MetricOption = "top1",
    auc_rule: opt.AucRuleOption = "trapezoid",
    answer_in_input: opt.AnswerOption = True,
) -> None:
    """Mask all heads, unmask them in each method's order, and show the areas under the curves."""
    from ra_lens.cli import show_results as show
    from ra_lens.experiments import area_under_curve, perturbation_test
    from ra_lens.report.experiments import write_perturbation_page
    from ra_lens.tables import mean_over_questions

    frame = setup.run(
        perturbation_test,
        methods=methods,
        step=step,
        heads_kept=None if heads_kept is None else whole_numbers(heads_kept, "--heads-kept"),
        others=others,
        random_orders=random_orders,
        each_question=each_question,
        n_rank=n_rank,
        n_test=n_test,
        rank_shots=rank_shots,
        answer_in_input=answer_in_input,
        accuracy=_ACCURACIES[accuracy],
    )
    means = mean_over_questions(frame)
    areas = area_under_curve(means, metric=metric, rule=auc_rule)
    setup.tell(
        means,
        facts=lambda: show.areas_facts(means, areas, metric=metric, rule=auc_rule),
        text=lambda: show.print_areas(means, areas, metric=metric),
        draw=lambda path: write_perturbation_page(means, areas, path, metric=metric),
    )


@with_setup
def patch(
    setup: Setup,
    *,
    scales: Annotated[
        list[str] | None,
        typer.Option(
            help="Factors of the added maps: -30 1; or best, the one found on the training "
            "questions. Default: the paper's 24, 3 to -120."
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="Maps to add: ra, pattern, and controls as large as RA: shuffled, grad, "
            "centred_grad and a_grad. Default: ra pattern."
        ),
    ] = None,
    n_mean: Annotated[int, typer.Option(min=1, help="Questions whose maps are averaged.")] = 25,
    n_test: opt.NTestOption = None,
    length: opt.LengthOption = None,
    at_least: opt.AtLeastOption = None,
    answer_tokens: opt.AnswerTokensOption = 1,
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Keep every row of the pattern a distribution.")
    ] = False,
    at: Annotated[
        opt.Where, typer.Option(help="What maps are added to: the pattern, or the scores.")
    ] = "pattern",
    each_question: opt.EachQuestionOption = False,
    accuracy: opt.AccuracyOption = "first-token",
    metric: opt.MetricOption = "top1",
) -> None:
    """Add scaled mean maps to the attention of other questions; show what the model then does."""
    from ra_lens.cli import show_results as show
    from ra_lens.experiments import PAPER_SCALES, patching_sweep
    from ra_lens.experiments.mean_maps import MapName
    from ra_lens.report.experiments import write_sweep_page
    from ra_lens.tables import mean_over_questions

    factors: list[float] | Literal["best"]
    if scales is not None and split_values(scales, "--scales") == ["best"]:
        factors = "best"
        if setup.figure is not None:
            raise BadInput(
                "found --figure with --scales best, which gives one scale for each task and no "
                "curve. Leave one of them out."
            )
    else:
        factors = list(PAPER_SCALES) if scales is None else numbers(scales, "--scales")
    maps = ["ra", "pattern"] if kinds is None else some_of(kinds, "--kinds", get_args(MapName))
    frame = setup.run(
        patching_sweep,
        scales=factors,
        kinds=maps,
        n_mean=n_mean,
        n_test=n_test,
        length=length,
        at_least=at_least,
        answer_tokens=answer_tokens,
        each_question=each_question,
        renormalise=renormalise,
        at=at,
        accuracy=_ACCURACIES[accuracy],
    )
    means = mean_over_questions(frame)
    setup.tell(
        means,
        facts=lambda: show.sweep_facts(means, metric=metric),
        text=lambda: show.print_sweep(means, metric=metric),
        draw=lambda path: write_sweep_page(means, path, metric=metric),
    )


@partial(with_setup, without=["shots"])
def ablate_patch(
    setup: Setup,
    *,
    ablations: Annotated[
        list[str] | None,
        typer.Option(
            help="What of the map is compared with the whole: layers heads rows sign place prompts "
            "transfer shots controls. Default: all."
        ),
    ] = None,
    scales: Annotated[
        list[str] | None,
        typer.Option(
            help="paper (-30, forward attention 1; the default), best (of each, found on the "
            "training questions), or both."
        ),
    ] = None,
    tried: Annotated[
        list[str] | None,
        typer.Option(help="Scales that the best is chosen from. Default: 32, 3 to -3000."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Ways to rank heads, as in ra-lens rank. Default: ra."),
    ] = None,
    head_shares: Annotated[
        list[str] | None,
        typer.Option(help="Shares of the heads that are the first. Default: 0.1 0.25."),
    ] = None,
    n_prompts: Annotated[
        list[str] | None,
        typer.Option(help="Fewer questions whose maps are averaged. Default: 1 5."),
    ] = None,
    from_shots: Annotated[
        list[str] | None,
        typer.Option(help="Solved examples in the prompts of other maps. Default: 1 5."),
    ] = None,
    shots: Annotated[
        list[str] | None,
        typer.Option(help="Solved examples per question, one number or many. Default: 0."),
    ] = None,
    n_mean: Annotated[int, typer.Option(min=1, help="Questions whose maps are averaged.")] = 25,
    n_test: opt.NTestOption = None,
    length: opt.LengthOption = None,
    at_least: opt.AtLeastOption = None,
    answer_tokens: opt.AnswerTokensOption = 1,
    each_question: opt.EachQuestionOption = False,
    accuracy: opt.AccuracyOption = "first-token",
    metric: opt.MetricOption = "top1",
) -> None:
    """Patch with parts of the mean map and with others; show what of it carries the effect."""
    from ra_lens.cli import show_results as show
    from ra_lens.experiments import ablation_effects, patching_ablations
    from ra_lens.experiments.ablations import ABLATIONS, ScaleFrom
    from ra_lens.report.experiments import write_ablations_page
    from ra_lens.scales import SCALES

    setup.shots = ["0"] if shots is None else shots
    shares = ["0.1", "0.25"] if head_shares is None else head_shares
    longer = ["1", "5"] if from_shots is None else from_shots
    frame = setup.run(
        patching_ablations,
        ablations=ABLATIONS if ablations is None else some_of(ablations, "--ablations", ABLATIONS),
        scales=["paper"] if scales is None else some_of(scales, "--scales", get_args(ScaleFrom)),
        tried=SCALES if tried is None else numbers(tried, "--tried"),
        methods=["ra"] if methods is None else methods,
        head_shares=numbers(shares, "--head-shares"),
        n_prompts=None if n_prompts is None else whole_numbers(n_prompts, "--n-prompts"),
        from_shots=whole_numbers(longer, "--from-shots"),
        n_mean=n_mean,
        n_test=n_test,
        length=length,
        at_least=at_least,
        answer_tokens=answer_tokens,
        each_question=each_question,
        accuracy=_ACCURACIES[accuracy],
    )
    effects = ablation_effects(frame, metric=metric)
    setup.tell(
        frame,
        facts=lambda: show.effects_facts(effects),
        text=lambda: show.print_effects(effects),
        draw=lambda path: write_ablations_page(frame, effects, path),
    )


@partial(with_setup, without=["shots"])
def knockout(
    setup: Setup,
    *,
    shots: Annotated[
        list[str] | None,
        typer.Option(help="Solved examples per question, one number or many. Default: 1."),
    ] = None,
    n_test: Annotated[int, typer.Option(min=1, help="Test questions at most.")] = 12,
    n_edges: Annotated[
        int,
        typer.Option(
            min=0, help="Edges cut in each layer of each question: half at random, half strongest."
        ),
    ] = 2,
    n_sets: Annotated[
        int, typer.Option(min=0, help="Spans cut off from the last token, for each question.")
    ] = 2,
    windows: Annotated[
        list[str] | None,
        typer.Option(help="Numbers of layers in which a span is cut. Default: 1 3 5."),
    ] = None,
    cuts: Annotated[
        list[str] | None,
        typer.Option(
            help="renormalised (the rest of a row gets what was cut; the default), plain, or both."
        ),
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(help="Also integrate each set's cut at so many points: 1, 2 3. Default: no."),
    ] = None,
    ends: Annotated[
        bool, typer.Option("--ends", help="Also take each set's slope where all is cut.")
    ] = False,
    steps_of: Annotated[
        Literal["sets", "all"], typer.Option(help="Steps and ends of sets only, or of all cuts.")
    ] = "sets",
) -> None:
    """Cut edges of attention, and show how well one backward pass foretold what that does."""
    from ra_lens.cli import show_results as show
    from ra_lens.experiments import knockout_agreement, knockout_test
    from ra_lens.experiments.knockout import CutName
    from ra_lens.report.experiments import write_knockout_page

    setup.shots = ["1"] if shots is None else shots
    frame = setup.run(
        knockout_test,
        n_test=n_test,
        n_edges=n_edges,
        n_sets=n_sets,
        windows=None if windows is None else whole_numbers(windows, "--windows"),
        cuts=["renormalised"] if cuts is None else some_of(cuts, "--cuts", get_args(CutName)),
        steps=() if steps is None else whole_numbers(steps, "--steps"),
        ends=ends,
        steps_of=steps_of,
    )
    found = knockout_agreement(frame)
    setup.tell(
        frame,
        facts=lambda: show.agreement_facts(frame, found),
        text=lambda: show.print_agreement(frame, found),
        draw=lambda path: write_knockout_page(frame, path),
    )
