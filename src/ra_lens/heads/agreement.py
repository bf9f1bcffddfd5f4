"""How well scores of heads agree with what really taking a head away does, with intervals.

From scores and effects of each prompt and head (`ra_lens.experiments.head_effect_table`), for each
method, with the mean of its scores over the prompts:

    spearman_signed     Spearman's ρ with the mean effect: heads that hurt belong last
    spearman_abs        ρ with the mean size of the effect: heads that hurt belong first, too
    precision_signed_k  share of the first k heads that are among the k of largest mean effect
    precision_abs_k     … of largest mean |effect|; by chance k over the number of heads, in both
    split_half          ρ between the scores of two halves of the prompts, mean over splits
    jaccard_k           |first k of one half ∩ of the other| / |∪|, likewise
    cross_half_signed   ρ of the scores of one half with the mean effects of the other, mean over
                        the same splits and both ways
    cross_half_abs      … with the mean sizes of the effects
    effects_split_half_signed   ρ between the mean effects of the two halves
    effects_split_half_abs      … between the mean sizes of the effects

ρ is that of ranks, those of equal values being their mean. Of equal scores the first head of the
model counts as the first.

The first four say what scores tell of the prompts that they were taken on. What one prompt has of
its own is in its scores and in its effects, so they may be well above the split-half ρ of the
effects, which is no bound for them. What scores tell of other prompts is `cross_half`, of half as
many. It stands beside `effects_split_half`: how well really taking heads away on one half foretells
the other. That is no bound either, since scores that vary less between prompts may do better.

Prompts are what was drawn, so the bootstrap draws prompts: with replacement, as many as there are
of each task and number of demonstrations, each with the scores and effects of all its heads. All
methods and ablations get the same draws, so that differences between two methods are paired. The
interval, around the value, is for the mean over other sets of as many prompts; why not the middle
share of the draws, `ra_lens.heads.intervals` says. Splits have no interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ra_lens.errors import BadInput
from ra_lens.heads.intervals import interval_around
from ra_lens.heads.registry import ranking_methods
from ra_lens.numbers import Real, Whole, Wholes, real, whole, wholes
from ra_lens.tables import problem_of
from ra_lens.tasks.task import stable_int

SCORE, EFFECT, SECONDS, LOGIT_DIFF = "score_", "effect_", "seconds_", "logit_diff_effect_"
"""How columns of a table of effects begin, before the name of a method or an ablation."""

_CELL = ["task", "n_shots"]
_NEEDED = [*_CELL, "question", "layer", "head"]
_MEASURES = ("spearman_signed", "spearman_abs")
_ACROSS = (
    *("cross_half_signed", "cross_half_abs"),
    *("effects_split_half_signed", "effects_split_half_abs"),
)
_RHO, _SHARE, _RHO_LESS_RHO = (-1.0, 1.0), (0.0, 1.0), (-2.0, 2.0)


def faithfulness(
    frame: pd.DataFrame,
    *,
    ks: Wholes = (10, 20),
    splits: Whole = 100,
    level: Real = 0.9,
    resamples: Whole = 1000,
    seed: Whole = 0,
) -> pd.DataFrame:
    """Say how well each method foretells what taking one head away does.

    Args:
        frame: From `head_effect_table`, of one model; several may be concatenated.
        ks: Numbers of heads at which precision and stability are taken.
        splits: Into how many pairs of random halves the prompts are divided; into all that there
            are, where these are no more.
        level: Share of intervals that are to hold the mean over sets of as many prompts.
        resamples: How often prompts are drawn.
        seed: Of draws and splits.

    Returns:
        A table with one row per task, number of demonstrations, method and ablation, with the
        measures of `ra_lens.heads.agreement`, the first four with `_low` and `_high`; `n_prompts`,
        `n_heads`; what the scores cost, `forwards` and `backwards` in passes of one prompt (of
        effects, those of late layers are short) and `seconds`, those of the method alone; and what
        is needed to repeat it. Stability is NaN for methods that say the same on every prompt, and
        passes for methods of which nobody said.

    Raises:
        BadInput: not such a table, several models in it, or an option that cannot be used.
    """
    summary = Summary.read(ks, splits, level, resamples, seed)
    counts, splits = summary.ks, summary.splits
    read = _Read(frame, summary.level, summary.resamples, summary.seed)
    rows: list[dict[str, Any]] = []
    for cell in read.cells():
        summary.refuse_all_of(cell.n_heads)
        halves = cell.halves(splits, read.seed)
        for method in cell.scores:
            stable = cell.stability(method, halves, counts)
            cost = cell.cost(method)
            for ablation in cell.effects:
                row = {
                    **cell.facts,
                    "method": method,
                    "label": cell.label(method),
                    "ablation": ablation,
                    "n_prompts": cell.n_prompts,
                    "n_heads": cell.n_heads,
                }
                for name, values in cell.measured(method, ablation, counts).items():
                    within = _RHO if name in _MEASURES else _SHARE
                    row |= read.told(name, [values], [cell.n_prompts], within)
                across = cell.across(method, ablation, halves)
                rows.append({**row, **stable, **across, **cost})
    facts = _facts(frame)
    about = {"experiment": "faithfulness", "model": facts.get("model")}
    return pd.DataFrame([{**about, **row, **facts} for row in rows])


def faithfulness_differences(
    frame: pd.DataFrame,
    *,
    minus: str,
    methods: str | Sequence[str] | None = None,
    together: bool = False,
    level: Real = 0.9,
    resamples: Whole = 1000,
    seed: Whole = 0,
) -> pd.DataFrame:
    """Compare methods with one of them, on the same draws of prompts.

    Args:
        frame: As for `faithfulness`.
        minus: The method that others are compared with.
        methods: The others. Default: all.
        together: Take the mean over all tasks and numbers of demonstrations, each counting once,
            in place of a row for each.
        level: Share of intervals that are to hold the mean over sets of as many prompts.
        resamples: How often prompts are drawn, within each task and number of demonstrations.
        seed: Of the draws.

    Returns:
        One row per task, number of demonstrations (if not `together`), ablation and method, with
        the differences of `spearman_signed` and `spearman_abs`, method minus `minus`, each with
        `_low` and `_high`. The prompts do not tell two methods apart where 0 lies between.

    Raises:
        BadInput: not such a table, several models in it, an unknown method or option.
    """
    read = _Read(frame, real("level", level), whole("resamples", resamples, least=1), seed)
    there = read.named(SCORE)
    given = [methods] if isinstance(methods, str) else methods
    chosen = [name for name in there if name != minus] if given is None else list(given)
    unknown = [name for name in (minus, *chosen) if name not in there]
    if not chosen or len(set(chosen)) < len(chosen):
        raise BadInput(
            f"found methods={methods!r} to compare with {minus!r}, of scores of "
            f"{', '.join(map(repr, there))}. Give at least one, each once."
        )
    if unknown:
        raise BadInput(
            f"found method {unknown[0]!r}; the table has scores of {', '.join(map(repr, there))}."
        )
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str], list[Float[np.ndarray, "draw"]]] = {}
    sizes: list[int] = []
    for cell in read.cells():
        sizes.append(cell.n_prompts)
        for ablation in cell.effects:
            base = cell.measured(minus, ablation, ())
            for method in chosen:
                own = cell.measured(method, ablation, ())
                row = {**cell.facts, "ablation": ablation, "method": method, "minus": minus}
                for name in _MEASURES:
                    values = own[name] - base[name]
                    found.setdefault((ablation, method, name), []).append(values)
                    row |= read.told(name, [values], [cell.n_prompts], _RHO_LESS_RHO)
                rows.append({**row, "n_prompts": cell.n_prompts})
    if not together:
        return pd.DataFrame(rows)
    means: dict[tuple[str, str], dict[str, Any]] = {}
    for (ablation, method, name), of_cells in found.items():
        row = means.setdefault(
            (ablation, method),
            {"ablation": ablation, "method": method, "minus": minus, "n_cells": len(of_cells)},
        )
        row |= read.told(name, of_cells, sizes, _RHO_LESS_RHO)
    return pd.DataFrame(list(means.values()))


def _facts(frame: pd.DataFrame) -> dict[str, Any]:
    """What a table says of all its rows alike, other than what they are of and what they hold."""
    others = {*_NEEDED, "experiment", "kind", "label", "loss", "logit_diff", "n_rank"}
    begins = (SCORE, EFFECT, SECONDS, LOGIT_DIFF)
    names = [n for n in map(str, frame) if n not in others and not n.startswith(begins)]
    return {name: frame[name].iloc[0] for name in names if frame[name].nunique(dropna=False) == 1}


@dataclass(frozen=True)
class Summary:
    """How a table of effects is summed up: the options of `faithfulness`, read."""

    ks: list[int]
    splits: int
    level: float
    resamples: int
    seed: int

    @classmethod
    def read(
        cls,
        ks: Wholes = (10, 20),
        splits: Whole = 100,
        level: Real = 0.9,
        resamples: Whole = 1000,
        seed: Whole = 0,
    ) -> Summary:
        """Read the options, or raise BadInput where they cannot be used with any table."""
        level = real("level", level)
        _check_level(level)
        return cls(
            wholes("ks", ks, least=1),
            whole("splits", splits, least=1),
            level,
            whole("resamples", resamples, least=1),
            whole("seed", seed, least=0),
        )

    def refuse_all_of(self, n_heads: int) -> None:
        """Raise BadInput unless the first heads are fewer than all, which say nothing."""
        if max(self.ks) >= n_heads:
            raise BadInput(
                f"found ks={self.ks} for a model of {n_heads} heads. Give numbers of heads that "
                "are fewer than all of them (ks=, --k)."
            )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInput(f"found level={level}; give a share between 0 and 1, such as 0.9.")


class _Read:
    """A table of effects that has been looked through, and how intervals are taken."""

    def __init__(self, frame: Any, level: float, resamples: int, seed: Whole) -> None:
        problem = problem_of(frame, _NEEDED, rows=True)
        self._frame, self._level, self._resamples = frame, level, resamples
        self.seed = whole("seed", seed, least=0)
        _check_level(level)
        if problem is None and not (self.named(SCORE) and self.named(EFFECT)):
            problem = "without scores of a method, or without effects"
        problem = problem or problem_of(frame, self._columns)
        if problem is not None:
            raise BadInput(f"found a table {problem}; give the result of head_effect_table().")
        models = list(dict.fromkeys(frame["model"].astype(str))) if "model" in frame else []
        if len(models) > 1:
            raise BadInput(
                f"found results of {len(models)} models ({', '.join(models)}). Give "
                f"frame[frame.model == {models[0]!r}]."
            )

    def named(self, begin: str) -> list[str]:
        """Names of methods or ablations that have columns which begin so."""
        names = map(str, self._frame)
        return [name.removeprefix(begin) for name in names if name.startswith(begin)]

    @property
    def _columns(self) -> list[str]:
        return [begin + name for begin in (SCORE, EFFECT) for name in self.named(begin)]

    def cells(self) -> Iterator[_Cell]:
        """Tasks and numbers of demonstrations."""
        for _, part in self._frame.groupby(_CELL, sort=False):
            ordered = part.sort_values(["question", "layer", "head"], kind="stable")
            heads = ordered.groupby(["layer", "head"]).ngroups
            n = ordered["question"].nunique()
            if len(ordered) != n * heads:
                raise BadInput(
                    f"found {len(ordered)} rows for {n} prompts and {heads} heads of task "
                    f"{ordered['task'].iloc[0]!r}. Give all heads of every prompt, once, as "
                    "head_effect_table() does."
                )

            def values(begin: str, part: Any = ordered, n: int = n) -> dict[str, Any]:
                return {
                    name: _finite(part[begin + name].to_numpy(float)).reshape(n, -1)
                    for name in self.named(begin)
                }

            first = ordered.iloc[0]
            facts = {name: first[name] for name in ("task", "kind", "n_shots") if name in ordered}
            seconds = {name: float(first[SECONDS + name]) for name in self.named(SECONDS)}
            # Of its own for each cell, whatever else the table has.
            key = stable_int(*(first[name] for name in _CELL))
            generator = np.random.default_rng([self.seed, key])
            weights = np.ones((1 + self._resamples, n))
            weights[1:] = generator.multinomial(n, np.full(n, 1 / n), size=self._resamples)
            yield _Cell(facts, values(SCORE), values(EFFECT), seconds, weights / n)

    def told(
        self,
        name: str,
        of_cells: Sequence[Float[np.ndarray, "draw"]],
        sizes: Sequence[int],
        within: tuple[float, float],
    ) -> dict[str, float]:
        """The mean over cells of what all their prompts give, with its interval."""
        value = float(np.mean([values[0] for values in of_cells]))
        drawn = [values[1:] for values in of_cells]
        low, high = interval_around(value, drawn, sizes, level=self._level, within=within)
        return {name: value, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True, eq=False)
class _Cell:
    """Scores and effects of one task and number of demonstrations, `[prompt, head]` each."""

    facts: dict[str, Any]
    scores: dict[str, Float[np.ndarray, "prompt head"]]
    effects: dict[str, Float[np.ndarray, "prompt head"]]
    seconds: dict[str, float]
    weights: Float[np.ndarray, "draw prompt"]  # of a mean; the first draw has each prompt once

    @property
    def n_prompts(self) -> int:
        return self.weights.shape[1]

    @property
    def n_heads(self) -> int:
        return next(iter(self.effects.values())).shape[1]

    @cached_property
    def _means(self) -> dict[str, Float[np.ndarray, "draw head"]]:
        return {name: self.weights @ values for name, values in self.scores.items()}

    @cached_property
    def _targets(self) -> dict[str, dict[str, Float[np.ndarray, "draw head"]]]:
        return {
            name: {"signed": self.weights @ values, "abs": self.weights @ np.abs(values)}
            for name, values in self.effects.items()
        }

    def measured(
        self, method: str, ablation: str, ks: Sequence[int]
    ) -> dict[str, Float[np.ndarray, "draw"]]:
        """ρ and precision in each draw."""
        score, targets = self._means[method], self._targets[ablation]
        found = {f"spearman_{kind}": spearman(score, of) for kind, of in targets.items()}
        for k in ks:
            first = top(score, k)
            for kind, of in targets.items():
                found[f"precision_{kind}_{k}"] = (first & top(of, k)).sum(axis=1) / k
        return found

    def halves(self, splits: int, seed: int) -> Float[np.ndarray, "half split prompt"]:
        """Weights of the means of both halves of the prompts: all splits, or some at random."""
        n = self.n_prompts
        if comb(n, n // 2) // (2 - n % 2) <= splits:
            # Of an even number of prompts the half without the first is the other half.
            taken = [c for c in combinations(range(n), n // 2) if n % 2 or 0 in c]
            first = np.array([[float(i in c) for i in range(n)] for c in taken])
        else:
            generator = np.random.default_rng([seed, 1])
            order = generator.permuted(np.tile(np.arange(n), (splits, 1)), axis=1)
            first = (order < n // 2).astype(float)
        return np.stack([first / max(n // 2, 1), (1 - first) / (n - n // 2)])

    def stability(
        self, method: str, halves: Float[np.ndarray, "half split prompt"], ks: Sequence[int]
    ) -> dict[str, float]:
        """How alike the scores of two halves are; NaN where a prompt has none of its own."""
        scores = self.scores[method]
        if self.n_prompts < 2 or bool((scores == scores[0]).all()):
            return dict.fromkeys(["split_half", *(f"jaccard_{k}" for k in ks)], float("nan"))
        one, other = halves @ scores
        found = {"split_half": _mean(spearman(one, other))}
        for k in ks:
            both = (top(one, k) & top(other, k)).sum(axis=1)
            found[f"jaccard_{k}"] = float((both / (2 * k - both)).mean())
        return found

    def across(
        self, method: str, ablation: str, halves: Float[np.ndarray, "half split prompt"]
    ) -> dict[str, float]:
        """How well the scores of one half, and its effects, foretell the effects of the other."""
        effects, found = self.effects[ablation], dict[str, float]()
        if self.n_prompts > 1:
            scores = np.concatenate(halves @ self.scores[method])
            for kind, each in (("signed", effects), ("abs", np.abs(effects))):
                one, other = halves @ each
                found[f"cross_half_{kind}"] = _mean(spearman(scores, np.concatenate([other, one])))
                found[f"effects_split_half_{kind}"] = _mean(spearman(one, other))
        return {name: found.get(name, float("nan")) for name in _ACROSS}

    def label(self, method: str) -> str:
        """What tables call a method."""
        known = ranking_methods().get(method)
        return (known.label if known is not None else "") or method

    def cost(self, method: str) -> dict[str, float]:
        """Passes and seconds of the scores of all prompts."""
        known = ranking_methods().get(method)
        passes = None if known is None else known.passes
        n, nan = self.n_prompts, float("nan")
        return {
            "forwards": nan if passes is None else float(n * passes.forwards(self.n_heads)),
            "backwards": nan if passes is None else float(n * passes.backward),
            "seconds": self.seconds.get(method, nan),
        }


def _finite(values: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
    """Put what is below all others in the place of minus infinity, which has no mean."""
    known = values[np.isfinite(values)]
    least = known.min() - 1 if len(known) else 0.0
    return np.where(np.isneginf(values), least, values)


def spearman(
    one: Float[np.ndarray, "draw head"], other: Float[np.ndarray, "draw head"]
) -> Float[np.ndarray, "draw"]:
    """Spearman's ρ of each row; NaN where one of both does not vary."""
    x, y = (pd.DataFrame(values).rank(axis=1).to_numpy() for values in (one, other))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.where(scale > 0, (x * y).sum(axis=1) / np.where(scale > 0, scale, 1), np.nan)


def _mean(values: Float[np.ndarray, "draw"]) -> float:
    """The mean of those that are known; NaN of none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def top(values: Float[np.ndarray, "draw head"], k: int) -> Bool[np.ndarray, "draw head"]:
    """Mark the `k` largest of each row; of equal ones the first."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    marked = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(marked, order, values=True, axis=1)
    return marked
