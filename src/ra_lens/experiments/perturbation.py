"""Area under a perturbation curve: one number for how good an order of the heads is.

    AUC = Σ (m_i + m_{i+1}) / 2 · (p_{i+1} − p_i)        p: share of the heads unmasked, 0 to 1

the trapezoid, for accuracy or any other column m. No rule is published with the paper's numbers;
the trapezoid fits them: rows whose full model is nearly perfect have a floor of .05, which is what
the last trapezoid of 11 points alone gives. The mean of the points would give .09.

The perturbation test: zero every head, then unmask them in order of importance (section 5.2).

A good order restores the accuracy with few heads. At each share p of the heads, ⌊p·H⌋ heads of the
order are kept and the others zeroed (`ra_lens.patching.masking`); the model answers the test
questions, and accuracy top-1, top-2, top-3 and the logit difference are noted. Both the order and
its reverse are tested: most important first, and least important first.

Cost per task, number of demonstrations and order: (1/step − 1) forward passes over the test
questions. Shares and questions of like length are batched together; the two ends, no head and all
heads, are the same for every order and are evaluated once. Rankings: see `ra_lens.heads`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.journal import Journal, open_journal
from ra_lens.experiments.protocol import (
    SHOTS,
    Tasks,
    accuracy_settings,
    answer_facts,
    asked,
    learned,
    read_shots,
    read_tasks,
    refuse_hooks,
    task_facts,
    task_settings,
    warn_of_first_tokens,
)
from ra_lens.experiments.rank import METHODS, by_first_token, method_facts, read_methods
from ra_lens.experiments.results import (
    as_frame,
    finished_results,
    model_facts,
    prompts_hash,
    write_results,
)
from ra_lens.heads import HeadScores, rank_heads, ranking_methods
from ra_lens.model import Lens, as_lens
from ra_lens.numbers import Real, Whole, Wholes, real, whole, whole_or_none
from ra_lens.patching.masking import mask_hooks, need_heads
from ra_lens.questions import Accuracy, ask, marked, read_questions
from ra_lens.tables import problem_of
from ra_lens.tasks import Prompt, SplitRule, Task

Rule = Literal["trapezoid", "mean"]
Measure = Literal["top1", "top2", "top3", "logit_diff"]

_CURVE = ["model", "task", "kind", "n_shots", "method", "direction"]


def area_under_curve(
    frame: pd.DataFrame, *, metric: Measure = "top1", rule: Rule = "trapezoid"
) -> pd.DataFrame:
    """Take the area under each curve of a perturbation test.

    Args:
        frame: From `perturbation_test`; several may be concatenated.
        metric: Which column to integrate: accuracy `top1`, `top2`, `top3`, or `logit_diff`.
        rule: `"trapezoid"`, or the plain `"mean"` of the points.

    Returns:
        One row per model, task, number of shots, method and direction, with `auc` (the mean over
        draws for random orders), `auc_low` and `auc_high` (smallest and largest draw), `draws`.

    Raises:
        BadInput: not a frame of perturbation curves, an unknown rule, or a curve that does not
            reach from 0 to 1.
    """
    problem = problem_of(frame, [*_CURVE, "draw", "share", metric])
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of perturbation_test().")
    if rule not in ("trapezoid", "mean"):
        raise BadInput(f"found rule={rule!r}; give 'trapezoid' or 'mean'.")
    areas: list[dict[str, Any]] = []
    for key, curve in frame.groupby([*_CURVE, "draw"], sort=False):
        names = curve.iloc[0][[*_CURVE, "draw"]].to_dict()
        areas.append({**names, "auc": _area(curve, metric, rule, key)})
    grouped = pd.DataFrame(areas, columns=[*_CURVE, "draw", "auc"]).groupby(_CURVE, sort=False)
    return grouped.agg(
        auc=("auc", "mean"), auc_low=("auc", "min"), auc_high=("auc", "max"), draws=("auc", "size")
    ).reset_index()


def _area(curve: pd.DataFrame, metric: str, rule: Rule, key: object) -> float:
    ordered = curve.sort_values("share")
    shares = ordered["share"].to_numpy(dtype=float)
    values = ordered[metric].to_numpy(dtype=float)
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or bool((np.diff(shares) <= 0).any()):
        raise BadInput(
            f"the curve of {key} has shares {shares.tolist()}; each has to be there once, from 0 "
            "to 1. Give the results of one run; take the areas of several seeds one by one."
        )
    if rule == "mean":
        return float(values.mean())
    return float(((values[1:] + values[:-1]) / 2 * np.diff(shares)).sum())


Direction = Literal["forward", "reversed"]
Row = dict[str, Any]


@dataclass(frozen=True)
class _Options:
    methods: list[str]
    directions: list[Direction]
    steps: int
    random_orders: int
    n_rank: int
    n_test: int | None
    rank_shots: int | None
    split: SplitRule
    answer_in_input: bool
    accuracy: Accuracy
    seed: int
    prepend_bos: bool | None
    batch_size: int
    progress: bool


def perturbation_test(
    model: nn.Module,
    task: Tasks,
    *,
    methods: str | Sequence[str] = METHODS,
    shots: Wholes = SHOTS,
    step: Real = 0.1,
    directions: Sequence[Direction] = ("forward", "reversed"),
    random_orders: Whole = 20,
    n_rank: Whole = 25,
    n_test: Whole | None = None,
    rank_shots: Whole | None = None,
    split: SplitRule = "code",
    answer_in_input: bool = True,
    accuracy: Accuracy = "first token",
    seed: Whole = 0,
    prepend_bos: bool | None = None,
    batch_size: Whole = 64,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Zero all heads and unmask them in the order of each ranking method (paper section 5.2).

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of `ra_lens.heads.ranking_methods()`.
        shots: Numbers of demonstrations.
        step: Share of the heads unmasked at a time; 1/step is a whole number.
        directions: `"forward"`: most important first; `"reversed"`: least important first.
        random_orders: How many orders to draw for random methods; they have no direction.
        n_rank: Prompts per ranking.
        n_test: Test questions at most. Default: the whole test part.
        rank_shots: Demonstrations in the prompts that heads are ranked with. Default: as many as
            in the questions.
        split: `"code"`: 70/9/21 % for train/valid/test, as in the paper's code; `"text"`: a third
            for test, as in its text.
        answer_in_input: Whether RA and FA are taken on prompt and answer (the paper's experiments)
            or on the prompt alone.
        accuracy: What counts as right: `"first token"` of the answer (the paper's), or the whole
            `"answer"`, as a greedy decode gives it. The first says nothing where all answers of a
            task begin with one token, as digits after a space do in many tokenizers.
        seed: Demonstrations, and random orders.
        prepend_bos: Overrides the model's default.
        batch_size: Rows per forward pass.
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped.
        progress: False hides the progress bar.

    Returns:
        One row per task, number of demonstrations, method, direction, draw and share of the heads
        unmasked: `heads_kept`, accuracy `top1`, `top2`, `top3` (first answer token, at the last
        position of the prompt), and `logit_diff` (the answer's logit minus the best other one,
        mean); `accuracy` and `n_first_tokens`, the number of different first tokens among the
        answers asked for; then what is needed to repeat it. With `accuracy="answer"` top-k is the
        share of questions with every token of the answer among the first k, and `logit_diff` the
        smallest of its tokens.

    Raises:
        BadInput: an option that cannot be used, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be masked.
    """
    tasks, counts = read_tasks(task), read_shots(shots)
    options = _Options(
        methods=read_methods(methods),
        directions=_read_directions(directions),
        steps=_read_step(real("step", step)),
        random_orders=whole("random_orders", random_orders, least=1),
        n_rank=whole("n_rank", n_rank, least=1),
        n_test=whole_or_none("n_test", n_test, least=1),
        rank_shots=whole_or_none("rank_shots", rank_shots, least=0),
        split=split,
        answer_in_input=answer_in_input,
        accuracy=accuracy,
        seed=whole("seed", seed),
        prepend_bos=prepend_bos,
        batch_size=whole("batch_size", batch_size, least=1),
        progress=progress,
    )
    lens = as_lens(model)
    lens.refuse_dropout()
    need_heads(lens)
    refuse_hooks(lens, out)
    settings = {
        "experiment": "perturbation",
        **model_facts(lens),
        **{k: v for k, v in vars(options).items() if k not in ("progress", "accuracy")},
        **accuracy_settings(accuracy),
        "tasks": [task_settings(lens, one, prepend_bos) for one in tasks],
        "methods": method_facts(options.methods),
        "shots": counts,
    }
    _warn_if_folded(lens)
    if (finished := finished_results(out, settings)) is not None:
        return finished
    # All prompts are made before anything runs, so that a mistake in the last task shows at once.
    cells = [_Cell(lens, one, n, options) for one in tasks for n in counts]
    by_first = by_first_token(options.methods, answer_in_input=answer_in_input)
    read = [(cell.task, cell.questions) for cell in cells]
    warn_of_first_tokens(lens, read, accuracy=accuracy, by_first=by_first)
    rows: list[Row] = []
    with open_journal(out, settings) as journal:
        orders = len(list(_orders(options)))
        bar = tqdm(total=len(cells) * orders, desc="Perturbation test", disable=not progress)
        with bar:
            for cell in cells:
                bar.set_postfix_str(cell.name)
                rows += cell.rows(journal, bar.update)
        frame = as_frame("perturbation", rows, settings)
        if out is not None:
            write_results(frame, out)
    return frame


class _Cell:
    """One task with one number of demonstrations."""

    def __init__(self, lens: Lens, task: Task, shots: int, options: _Options) -> None:
        self._lens = lens
        self.task = task
        self._shots = shots
        self._options = options
        split = task.split(options.split)
        self._asked = asked(split, shots=shots, n=options.n_test, seed=options.seed)
        rank_shots = shots if options.rank_shots is None else options.rank_shots
        self._learned: dict[str, list[Prompt]] = {}
        for method in options.methods:
            part = ranking_methods()[method].split
            if part not in self._learned:
                n, seed = options.n_rank, options.seed
                self._learned[part] = learned(
                    split, part, shots=rank_shots, n=n, seed=seed, count="n_rank"
                )
        self._journal = Journal({}, None)
        self.questions = read_questions(lens, self._asked, prepend_bos=options.prepend_bos)

    @property
    def name(self) -> str:
        """What the progress bar says."""
        return f"{self.task.name}, shots: {self._shots}"

    def rows(self, journal: Journal, advance: Callable[[], object]) -> list[Row]:
        """Rows of every order, in the order of the methods given."""
        self._journal = journal
        rows: list[Row] = []
        ends = self._unit("ends", lambda: self._evaluate([], [0, self._n_heads]))
        for method, draw, direction in _orders(self._options):
            inner = self._unit(
                f"curve|{method}|{direction}|{draw}",
                lambda m=method, w=draw, d=direction: self._curve(m, w, d),
            )
            advance()
            about = self._about(method, direction, draw)
            shares = [i / self._options.steps for i in range(self._options.steps + 1)]
            for share, row in zip(shares, [ends[0], *inner, ends[1]], strict=True):
                rows.append({**about, "share": share, **row, "n_test": len(self._asked)})
        made = {
            **answer_facts(self.questions, self._options.accuracy),
            **task_facts(self.task),
            "prompts_hash": prompts_hash(self._asked, *self._learned.values()),
        }
        return [{**row, **made} for row in rows]

    # ---- inside ---------------------------------------------------------------------------------

    @property
    def _n_heads(self) -> int:
        return sum(self._lens.sites.n_heads)

    def _unit(self, name: str, compute: Callable[[], Any]) -> Any:
        return self._journal.unit(f"{self.task.name}|{self._shots}|{name}", compute)

    def _about(self, method: str, direction: str, draw: int) -> Row:
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "n_shots": self._shots,
            "method": method,
            "direction": direction,
            "draw": draw,
        }

    def _curve(self, method: str, draw: int, direction: str) -> list[Row]:
        ranked = self._unit(f"scores|{method}|{draw}", lambda: self._scores(method, draw))
        order = [(int(layer), int(head)) for layer, head in ranked]
        if direction == "reversed":
            order = order[::-1]
        steps = self._options.steps
        return self._evaluate(order, [i * self._n_heads // steps for i in range(1, steps)])

    def _scores(self, method: str, draw: int) -> list[tuple[int, int]]:
        return self._ranked(method, draw).order()

    def _ranked(self, method: str, draw: int) -> HeadScores:
        options = self._options
        return rank_heads(
            self._lens.module,
            self._learned[ranking_methods()[method].split],
            method=method,
            seed=options.seed,
            draw=draw,
            answer_in_input=options.answer_in_input,
            prepend_bos=options.prepend_bos,
            batch_size=options.batch_size,
            progress=options.progress,
        )

    def _evaluate(self, order: list[tuple[int, int]], kept: list[int]) -> list[Row]:
        """Ask all questions with the first `kept` heads of the order, for each number of heads."""
        questions = self.questions
        n = len(questions)
        place = self._places(order)
        # One row per number of heads and question, so that a batch holds several numbers.
        every = questions.repeated(len(kept))
        heads = torch.tensor(kept).repeat_interleave(n)
        marks = ask(
            self._lens,
            every,
            lambda part: mask_hooks(self._lens.sites, place < heads[part, None, None]),
            accuracy=self._options.accuracy,
            batch_size=self._options.batch_size,
        )
        return [
            {"heads_kept": k, **marked(marks.part(slice(i * n, (i + 1) * n)))}
            for i, k in enumerate(kept)
        ]

    def _places(self, order: list[tuple[int, int]]) -> Tensor:
        """Place of each head in the order, `[layer, head]`; any order does for none and all."""
        sites = list(self._lens.sites)
        place = torch.zeros(self._lens.sites.shape, dtype=torch.long)
        for i, (layer, head) in enumerate(order):
            place[sites.index(layer), head] = i
        return place


def _orders(options: _Options) -> Iterator[tuple[str, int, str]]:
    """Methods with their draws and directions."""
    for method in options.methods:
        if ranking_methods()[method].random:
            yield from ((method, draw, "none") for draw in range(options.random_orders))
        else:
            yield from ((method, 0, direction) for direction in options.directions)


def _read_step(step: float) -> int:
    steps = round(1 / step) if step > 0 else 0
    if steps < 2 or abs(steps * step - 1) > 1e-9:
        raise BadInput(
            f"found step={step}; give a share of the heads that divides 1 into at least two parts, "
            "such as 0.1."
        )
    return steps


def _read_directions(directions: Iterable[Direction]) -> list[Direction]:
    given = list(directions)
    if not given or len(set(given)) < len(given) or set(given) - {"forward", "reversed"}:
        raise BadInput(f"found directions={directions!r}; give 'forward', 'reversed' or both.")
    return given


def _warn_if_folded(lens: Lens) -> None:
    if lens.value_biases_folded:
        warnings.warn(
            f"the value biases of {lens.name} are folded into its output biases, so a head whose "
            "z is zeroed still writes its value bias: the test is not the paper's (zeroed rows of "
            "W_O). Load the model with ra_lens.load_model, which does not fold. Recorded in the "
            "column value_biases_folded.",
            RALensWarning,
            stacklevel=3,
        )
