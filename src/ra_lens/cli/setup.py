"""`Setup`: the options that the commands that run an experiment share, and running one with them.

What it computes with is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ra_lens.cli import options as opt
from ra_lens.cli.command import read_batch_size, split_values, whole_numbers
from ra_lens.errors import BadInput
from ra_lens.files import PAGE, check_output, is_address, names_a_folder, user_path

if TYPE_CHECKING:
    import pandas as pd

    from ra_lens.tasks import Task

_WHERE = ("engine", "part")  # of the arguments of an experiment


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
    batch_size: opt.BatchSizeOption = "64"
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
        from ra_lens.memory import offering
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
        size, out, shown = read_batch_size(self.batch_size), self.out, self.demonstrations
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
        with session.quiet(debug=self.debug), offering("batch_size", typed=True):
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
