"""Which heads suffice: CPR and CMD of a perturbation test, of heads only.

With m(C) a measure of the model in which the heads outside C get something else
(`ra_lens.experiments.others`), and everything but heads is as it is:

    f(C) = (m(C) − m(∅)) / (m(all) − m(∅))
    CPR  = ∫ f dk       how much of the behaviour the first heads restore; more is better
    CMD  = ∫ |1 − f| dk  how far they are from the behaviour; 0 is best

k is the share of heads kept, from 0 to 1, and the integral a trapezoid over the points of the
curve. f is 0 for no head and 1 for all; heads that hurt make it larger than 1, which CPR counts
for and CMD against: so CPR goes best with signed scores, CMD with their sizes (direction
`"absolute"`).

The names and formulas are MIB's (Mueller et al. 2025), with two differences, for which numbers
cannot be compared with its tables: here the components are the heads, and MLPs and embeddings are
always kept; and the curve begins at k = 0, where MIB's begins at .001.

m is a mean over questions, of which f is taken; f of single questions is not averaged, as some have
next to nothing between none and all. The bootstrap draws questions and takes f anew each time; its
intervals lie around the value (`ra_lens.heads.intervals`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.intervals import draw_weights, read_bootstrap
from ra_lens.experiments.perturbation import CURVE
from ra_lens.heads.intervals import interval_around
from ra_lens.numbers import Real, Whole
from ra_lens.questions import METRICS, Metric
from ra_lens.tables import problem_of
from ra_lens.tasks.task import stable_int
from ra_lens.text import shots_name

_CELL = ["model", "task", "kind", "n_shots"]
_SMALL = 0.1  # logits, or share of right answers: less between none and all is little to divide by
_NONE = 1e-6  # of the larger of both: no more than rounding


def head_only_cpr_cmd(
    frame: pd.DataFrame,
    *,
    metric: Metric = "answer_diff",
    against: str | None = None,
    together: bool = False,
    level: Real = 0.9,
    resamples: Whole = 2000,
    seed: Whole = 0,
) -> pd.DataFrame:
    """Take head-only CPR and CMD of each order of a perturbation test; not MIB's numbers.

    Args:
        frame: From `perturbation_test`, best with `others="resample"` and `each_question=True`.
        metric: Which column is m: `answer_diff` (that of MIB), or another.
        against: Name of a method, such as `"random"`: how much larger the scores of each order are
            than those of its order (forward, or the mean over its draws) is given too.
        together: Give the means over all tasks and numbers of shots in place of each; questions are
            drawn within each.
        level: Share of intervals that are to hold the mean over sets of as many questions.
        resamples: How often questions are drawn.
        seed: Of the draws, which do not depend on the order of rows.

    Returns:
        One row per model, task, number of shots, method and direction, with `cpr` and `cmd` (means
        over draws for random orders), `m_none` and `m_all`. Of a table with questions also
        `n_questions` and intervals by the bootstrap over questions: `cpr_low`, `cpr_high`,
        `cmd_low`, `cmd_high`. With `against` also `cpr_more` and `cmd_more`; their intervals
        compare question by question, since all orders of a task get the same draws. They are NaN
        for a single question.

    Raises:
        BadInput: not such a frame, an option that cannot be used, or a model that answers as well
            without heads as with all, so that f is nothing.
    """
    level, resamples, seed = read_bootstrap(level, resamples, seed)
    if metric not in METRICS:
        raise BadInput(f"found metric={metric!r}; give one of {', '.join(map(repr, METRICS))}.")
    each, keys = "question" in frame, [*CURVE, "draw", "share"]
    problem = problem_of(frame, [*keys, *["question"] * each, metric])
    if problem is not None:
        wanted = ", others='resample'" * (metric == "answer_diff")
        raise BadInput(
            f"found a table {problem}; give the result of perturbation_test(...{wanted})."
        )
    cells: list[_Scored] = []
    for _, of_cell in _groups(frame, _CELL):
        curves = _Curves.read(of_cell, metric)
        # Of its own for each cell, whatever else the table has and wherever it stands.
        generator = np.random.default_rng([seed, curves.key])
        drawn = draw_weights(curves.n, resamples, generator) if each else None
        curves.check_gap(drawn, level, metric)
        cells.append(curves.scored(drawn))
    told = [_Scored.mean(cells)] if together else cells
    return pd.DataFrame([row for one in told for row in one.rows(against, level)])


Order = tuple[str, str]
"""Method and direction."""


@dataclass(frozen=True)
class _Scored:
    """CPR and CMD of the orders of a cell, of all questions and of each resample."""

    about: dict[str, Any]
    ends: dict[str, float]
    sizes: tuple[int, ...]  # numbers of questions of the cells that it is the mean of
    found: dict[Order, Float[np.ndarray, "2"]]
    drawn: dict[Order, Float[np.ndarray, "cell 2 resample"]] | None

    @staticmethod
    def mean(cells: Sequence[_Scored]) -> _Scored:
        """The mean over cells, however many questions each has."""
        orders = list(cells[0].found)
        if len({(one.about["model"], *one.found) for one in cells}) > 1:
            raise BadInput(
                "found several models, or tasks with different orders; together=True needs the "
                "same orders of one model for all."
            )
        first, n = cells[0], len(cells)
        tasks = {one.about["task"] for one in cells}
        shots = {one.about["n_shots"] for one in cells}
        about = {
            "model": first.about["model"],
            "task": first.about["task"] if len(tasks) == 1 else f"mean of {len(tasks)} tasks",
            "kind": ", ".join(dict.fromkeys(one.about["kind"] for one in cells)),
            "n_shots": first.about["n_shots"] if len(shots) == 1 else None,
        }
        drawn = None
        if first.drawn is not None:
            known = [one.drawn for one in cells if one.drawn is not None]
            drawn = {order: np.concatenate([one[order] for one in known]) for order in orders}
        return _Scored(
            about,
            {name: sum(one.ends[name] for one in cells) / n for name in first.ends},
            tuple(n for one in cells for n in one.sizes),
            {order: np.mean([one.found[order] for one in cells], axis=0) for order in orders},
            drawn,
        )

    def rows(self, against: str | None, level: float) -> Iterator[dict[str, Any]]:
        """One row for each order."""
        other = None
        if against is not None:
            wanted = [(against, "forward"), (against, "none")]
            other = next((order for order in self.found if order in wanted), None)
            if other is None:
                raise BadInput(
                    f"found against={against!r}; there is no such order from the most important "
                    f"head on, of {', '.join(' '.join(order) for order in self.found)}."
                )
        for order, found in self.found.items():
            row = {**self.about, "method": order[0], "direction": order[1]}
            drawn = None if self.drawn is None else self.drawn[order]
            row |= self._told("", found, drawn, level)
            if other is not None:
                less = None if self.drawn is None else self.drawn[other]
                paired = None if drawn is None or less is None else drawn - less
                row |= self._told("_more", found - self.found[other], paired, level)
            n = {} if self.drawn is None else {"n_questions": sum(self.sizes)}
            yield {**row, **self.ends, **n}

    def _told(
        self,
        ending: str,
        found: Float[np.ndarray, "2"],
        drawn: Float[np.ndarray, "cell 2 resample"] | None,
        level: float,
    ) -> dict[str, float]:
        told: dict[str, float] = {}
        for i, score in enumerate(("cpr", "cmd")):
            name, value = f"{score}{ending}", float(found[i])
            told[name] = value
            if drawn is not None:
                within = (0.0 if name == "cmd" else -np.inf, np.inf)
                low, high = interval_around(
                    value, list(drawn[:, i]), self.sizes, level=level, within=within
                )
                told |= {f"{name}_low": low, f"{name}_high": high}
        return told


@dataclass(frozen=True)
class _Curves:
    """All curves of a cell."""

    about: dict[str, Any]
    shares: Float[np.ndarray, "share"]
    values: dict[Order, Float[np.ndarray, "draw share question"]]

    @staticmethod
    def read(of_cell: pd.DataFrame, metric: str) -> _Curves:
        """Read the curves of a cell; refuse those that lack a point or have it twice."""
        about: dict[str, Any] = of_cell.iloc[0][_CELL].to_dict()
        frame = of_cell if "question" in of_cell else of_cell.assign(question=0)
        shares = np.unique(frame["share"].to_numpy(dtype=float))
        columns = pd.MultiIndex.from_product([shares, np.unique(frame["question"])])
        values: dict[Order, Any] = {}
        for order, curves in _groups(frame, ["method", "direction"]):
            twice = bool(curves.duplicated(["draw", "share", "question"]).any())
            wide: Any = None
            if not twice:
                by = ["share", "question"]
                wide = curves.pivot(index="draw", columns=by, values=metric)
                wide = wide.reindex(columns=columns).to_numpy(dtype=float)
            if twice or np.isnan(wide).any() or shares[0] != 0 or shares[-1] != 1:
                raise BadInput(
                    f"the curves of {' '.join(order)} on {_name(about)} do not have each "
                    f"of the shares {shares.tolist()} once, from 0 to 1, for every question. Give "
                    "the results of one run."
                )
            values[order] = wide.reshape(len(wide), len(shares), -1)
        return _Curves(about, shares, values)

    @property
    def key(self) -> int:
        """A number for the task and its demonstrations; two models get the same draws."""
        about = self.about
        return stable_int(about["task"], about["kind"], int(about["n_shots"]))

    @property
    def n(self) -> int:
        """Number of questions; 1 where their mean is all that is known."""
        return next(iter(self.values.values())).shape[-1]

    def ends(
        self, weights: Float[np.ndarray, "resample question"]
    ) -> tuple[Float[np.ndarray, "resample"], Float[np.ndarray, "resample"]]:
        """m with no head and with all, the same for every order."""
        first = next(iter(self.values.values()))[0]
        return first[0] @ weights.T, first[-1] @ weights.T

    def scored(self, drawn: Float[np.ndarray, "resample question"] | None) -> _Scored:
        """CPR and CMD of all questions, and of those drawn."""
        all_alike = np.full((1, self.n), 1 / self.n)
        none, every = (float(end[0]) for end in self.ends(all_alike))
        return _Scored(
            self.about,
            {"m_none": none, "m_all": every},
            (self.n,),
            {order: self._scores(order, all_alike)[:, 0] for order in self.values},
            None
            if drawn is None
            else {order: self._scores(order, drawn)[None] for order in self.values},
        )

    def _scores(
        self, order: Order, weights: Float[np.ndarray, "resample question"]
    ) -> Float[np.ndarray, "2 resample"]:
        """CPR and CMD, the mean over draws."""
        none, every = self.ends(weights)
        f = (self.values[order] @ weights.T - none) / (every - none)  # [draw, share, resample]
        return np.stack([self._area(of_f).mean(axis=0) for of_f in (f, np.abs(1 - f))])

    def _area(
        self, f: Float[np.ndarray, "draw share resample"]
    ) -> Float[np.ndarray, "draw resample"]:
        widths = np.diff(self.shares)[:, None]
        return ((f[:, 1:] + f[:, :-1]) / 2 * widths).sum(axis=1)

    def check_gap(
        self, drawn: Float[np.ndarray, "resample question"] | None, level: float, metric: str
    ) -> None:
        """Refuse or warn where all heads are hardly better than none, by which f divides."""
        none, every = (float(end[0]) for end in self.ends(np.full((1, self.n), 1 / self.n)))
        said = (
            f"{metric} of {_name(self.about)} is {every:.3g} with all heads, {none:.3g} with none"
        )
        take = "Take a task that the model can do, more examples, or more questions."
        if abs(every - none) <= _NONE * max(abs(every), abs(none)):
            raise BadInput(f"{said}: there is nothing for heads to restore. {take}")
        smallest = every - none - _SMALL
        if drawn is not None:
            of_none, of_every = self.ends(drawn)
            smallest = float(np.quantile(of_every - of_none, (1 - level) / 2))
        if smallest <= 0:
            warnings.warn(
                f"{said}: CPR and CMD divide by the difference, which is hardly above 0. {take}",
                RALensWarning,
                stacklevel=3,
            )


def _groups(frame: pd.DataFrame, by: list[str]) -> list[tuple[Any, Any]]:
    """Divide a frame by some columns, in the order of its rows."""
    return list(frame.groupby(by, sort=False))


def _name(about: dict[str, Any]) -> str:
    return f"task {about['task']!r} with {shots_name(int(about['n_shots']))}"
