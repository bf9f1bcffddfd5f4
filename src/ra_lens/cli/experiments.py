"""`ra-lens rank`, `perturb`, `patch`, `ablate-patch`, `knockout`, `compare`: one experiment each.

What a command computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import numbers, some_of, split_values, whole_numbers
from ra_lens.errors import BadInput
from ra_lens.files import PAGE, check_output, is_address, names_a_folder, user_path

if TYPE_CHECKING:
    import pandas as pd

    from ra_lens.questions import Accuracy
    from ra_lens.tasks import Task

_WHERE = ("engine", "part")  # of the arguments of an experiment
_ACCURACIES: dict[str, Accuracy] = {"first-token": "first token", "answer": "answer"}


@dataclass
class Setup:
    """The options that the commands that run an experiment share, as typed."""

    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="Tasks, one or many: antonym country-capital; or all, icl, natural.",
        ),
    ]
    model: opt.ModelOption = opt.DEMO
    source: Annotated[
        str,
        typer.Option(
            help="Where the tasks are from: builtin, download, or a folder with their files."
        ),
    ] = "builtin"
    shots: Annotated[
        list[str] | None,
        typer.Option(help="Solved examples per question, one number or many. Default: 0 1 5 10."),
    ] = None
    _: KW_ONLY  # in the help these follow a command's own options
    seed: Annotated[
        int, typer.Option(help="Seed of the solved examples and of the random orders.")
    ] = 0
    split: Annotated[
        opt.Split,
        typer.Option(
            help="Parts of a task: code (70 % train, 9 % valid, 21 % test) or text (a third test)."
        ),
    ] = "code"
    separator: Annotated[
        str | None,
        typer.Option(help=r"Text between solved examples, \n being a line break. Default: \n\n."),
    ] = None
    natural: Annotated[
        Literal["template", "qa"],
        typer.Option(
            help="Ask natural questions as their template alone, or as qa: Q: …, newline, A:"
        ),
    ] = "template"
    demonstrations: Annotated[
        Literal["own", "shared"],
        typer.Option(
            help="Solved examples: own (drawn anew for every question) or shared (the same before "
            "every question, several times as fast)."
        ),
    ] = "own"
    bos: opt.BosOption = None
    no_bos: opt.NoBosOption = False
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 64
    device: opt.DeviceOption = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Number format of the weights."),
    ] = "float32"
    kind: opt.KindOption = None
    allow_pickle: opt.PickleOption = False
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Results file, .parquet or .csv; or a folder or address, with a file for each "
            "cell of the grid. The same command goes on where it was killed.",
        ),
    ] = None
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Who computes: local (this process) or ray (workers of a Ray cluster)."),
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, such as auto. Default: one of this machine's CPUs, GPUs."),
    ] = None
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Compute part I of N of the grid alone; all N share a folder --out."
        ),
    ] = None
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the results: one self-contained HTML file.")
    ] = None
    as_json: opt.JsonOption = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False
    debug: opt.DebugOption = False

    def __post_init__(self) -> None:
        """Write `~` out, as the files are printed and as they are used."""
        if self.out is not None and not is_address(self.out):
            self.out = str(user_path(self.out)) + "/" * self.out.endswith("/")
        self.figure = None if self.figure is None else user_path(self.figure)

    def run(self, experiment: Callable[..., pd.DataFrame], **own: Any) -> pd.DataFrame:
        """Run an experiment; what can be wrong without a model is found before one is loaded."""
        from ra_lens.cli import session
        from ra_lens.cli.grids import tell_grids
        from ra_lens.experiments.grid import Folder
        from ra_lens.experiments.runner import METHODS, SHOTS, Protocol, read_methods
        from ra_lens.tables import TABLE

        on_workers = self.engine == "ray"
        session.prepare(self.model, None if on_workers else self.device)
        if self.out is not None:
            if names_a_folder(self.out):
                Folder.at(self.out).refuse_others()
            else:
                check_output(self.out, TABLE)
        if self.figure is not None:
            check_output(self.figure, PAGE)
            if self.part is not None:
                raise BadInput("found --figure with --part, which has a part of what is drawn.")
        if "methods" in own:
            typed = own["methods"]
            given = METHODS if typed is None else split_values(typed, "--methods")
            own["methods"] = read_methods(given)
        shots = SHOTS if self.shots is None else whole_numbers(self.shots, "--shots")
        front, progress = session.read_bos(self.bos, no_bos=self.no_bos), not self.quiet
        size, out, shown = self.batch_size, self.out, self.demonstrations
        where = self._where()
        split, seed = self.split, self.seed
        protocol = Protocol.read(shots, split, seed, front, size, out, progress, shown, **where)
        tasks = self.tasks()
        model = session.load(
            self.model,
            self.kind,
            "cpu" if on_workers else self.device,
            debug=self.debug,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
        )
        given = {name: value for name, value in vars(protocol).items() if name not in _WHERE}
        with session.quiet(debug=self.debug):
            frame = experiment(model, tasks, **given, **where, **own)
        if self.out is not None and self.part is not None:
            tell_grids([self.out], as_json=self.as_json)
            raise typer.Exit
        return frame

    def _where(self) -> dict[str, Any]:
        """Read who computes which part, where that is not this process and all of it."""
        from ra_lens.experiments import RayEngine

        if self.address is not None and self.engine != "ray":
            raise BadInput(f"found --address {self.address} without --engine ray. Give both.")
        found: dict[str, Any] = {} if self.part is None else {"part": self.part}
        if self.engine == "ray":
            import torch

            usual = "cuda" if torch.cuda.is_available() else "cpu"
            found["engine"] = RayEngine(self.address, device=self.device or usual)
        return found

    def tasks(self) -> list[Task]:
        """Read the tasks, and put them into the format asked for."""
        from ra_lens.cli.session import unescaped
        from ra_lens.tasks import load_task, task_names

        names: list[str] = []
        for name in split_values(self.task, "--task"):
            if name == "all":
                found = task_names(source=self.source)
            elif name in ("icl", "natural"):
                found = task_names(name, source=self.source)
            else:
                found = [name]
            if not found:
                raise BadInput(
                    f"found --task {name}, but there are no such tasks in --source {self.source}; "
                    f"it has {', '.join(task_names(source=self.source)) or 'none at all'}."
                )
            names += found
        tasks: list[Task] = []
        for name in names:
            task = load_task(name, source=self.source)
            if self.separator is not None:
                task = task.with_format(separator=unescaped(self.separator))
            if self.natural == "qa" and task.kind == "natural":
                task = task.with_format(
                    before_subject=f"Q: {task.before_subject}",
                    after_subject=f"{task.after_subject}\nA:",
                )
            tasks.append(task)
        return tasks

    def tell(
        self,
        frame: pd.DataFrame,
        *,
        facts: Callable[[], dict[str, Any]],
        text: Callable[[], None],
        draw: Callable[[Path], object] | None = None,
    ) -> None:
        """Draw the figure, if any, and print; where drawing fails, raise when all is printed."""
        from ra_lens.cli.show_results import print_facts, print_files

        figure, failed = self.figure, None
        if draw is not None and figure is not None:
            try:
                draw(figure)
            except BadInput as error:  # a disk that is full by now
                figure, failed = None, error
        if self.as_json:
            print_facts(frame, facts(), self.out, figure)
        else:
            text()
            print_files(self.out, figure)
        if failed is not None:
            raise failed


def with_setup(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give a command the options of `Setup` around its own, and hand them over as one."""
    parameters = signature(Setup, eval_str=True).parameters
    shared = {name: p for name, p in parameters.items() if name not in without}

    @wraps(command)
    def whole(**options: Any) -> None:
        setup = Setup(**{name: options.pop(name) for name in shared})
        command(setup, **options)

    _, *own = signature(command, eval_str=True).parameters.values()
    first = [p for p in shared.values() if p.kind is not Parameter.KEYWORD_ONLY]
    last = [p for p in shared.values() if p.kind is Parameter.KEYWORD_ONLY]
    every = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*first, *own, *last)]
    whole.__signature__ = Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
    return whole


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
