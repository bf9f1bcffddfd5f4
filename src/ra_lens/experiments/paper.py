"""Results beside the paper's published numbers, cell by cell.

The published numbers are read from a folder of tidy tables, `table1.csv` and so on, with columns
`table, model, task, kind, n_shots, method, direction` and either `auc` (perturbation test, tables
1, 2 and 5 to 12) or `scale` and `accuracy` (attention patching, tables 3 and 13).

Which of our cells is which of theirs:

    published               here                        why
    RA, FA, CM2             ra, fa, cm2, same direction
    CM1 reversed, "CM"      cm1 forward                 their score of CM1 is the effect of removing
    CM1 forward             cm1 reversed                a head, negative for heads that matter
    Index reversed          index forward               their plain order begins with the last
    Index forward           index reversed              layer, which the numbers agree with
    Random                  random
    original                patching, map none          unpatched
    FA +1, RA −30           patching, map pattern, ra   at the scale of the cell

A natural task that shares its name with another one is `natural/country-capital` here; sets of one
length carry it in their name, `antonym_len_8_1`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ra_lens.errors import BadFile, BadInput, RALensWarning
from ra_lens.experiments.perturbation import Rule, area_under_curve
from ra_lens.files import check_input, user_path
from ra_lens.questions import Metric
from ra_lens.tables import mean_over_questions, problem_of

_KEY = ["model", "task", "kind", "n_shots", "method", "direction", "scale", "metric"]
_SAME = {"CM": "CM1"}  # what tables 1 and 2 print, and what the others call it
_NEEDED = ["table", "model", "task", "kind", "n_shots", "method", "direction", "note"]
_OUT = [
    "table", "model", "task", "kind", "n_shots", "method", "direction", "scale", "paper", "ours",
    "difference", "note", "found", "our_model", "our_task", "our_cell",
]  # fmt: skip

# Letters and digits of a name, its organisation dropped, to the paper's name.
_MODELS = {
    "gpt2xl": "GPT2-xl",
    "opt13b": "OPT-1.3B",
    "gptj": "GPT-j",
    "gptj6b": "GPT-j",
    "llama27b": "Llama2-7B",
    "llama27bhf": "Llama2-7B",
}
_METHODS = {
    "ra": "RA", "fa": "FA", "cm1": "CM1", "cm2": "CM2", "index": "Index", "random": "Random",
}  # fmt: skip
_TURNED = {"forward": "reversed", "reversed": "forward"}  # directions of cm1 and index
_MAPS = {"none": "original", "ra": "RA", "pattern": "FA"}
_LENGTH = re.compile(r"_len_\d+_\d+\w*$")


def read_paper(folder: str | Path) -> pd.DataFrame:
    """Read the published numbers.

    Args:
        folder: Where `table*.csv` are.

    Returns:
        One row per published number, with the columns `table`, `model`, `task`, `kind`, `n_shots`,
        `method`, `direction`, `scale` (NaN where there is none), `metric` (`"auc"` or
        `"accuracy"`), `paper`, `note`. Names are as published, but kinds are `"icl"` and
        `"natural"` only.

    Raises:
        BadFile: there is no such folder, no table in it, or one that is not as above.
    """
    return pd.concat([_read_table(path) for path in paper_tables(folder)], ignore_index=True)


def paper_tables(folder: str | Path) -> list[Path]:
    """Give the files of the published numbers, in order."""
    root = user_path(folder)
    check_input(root, "Give the one with the paper's table*.csv.", folder=True)
    paths = sorted(root.glob("table*.csv"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise BadFile(f"{root} has no table*.csv. Give the folder with the paper's numbers.")
    return paths


def paper_model(name: str) -> str | None:
    """Give the paper's name of a model, or None where it has none of that name.

    Organisations and case are nothing: `facebook/opt-1.3b` is the paper's `OPT-1.3B`.
    """
    return _MODELS.get(re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower()))


def compare_with_paper(
    results: pd.DataFrame | Sequence[pd.DataFrame],
    folder: str | Path,
    *,
    as_model: str | None = None,
    metric: Metric = "top1",
    rule: Rule = "trapezoid",
) -> pd.DataFrame:
    """Lay results next to the published numbers.

    Args:
        results: Tables of `perturbation_test` and `patching_sweep`, several or one.
        folder: The published numbers; see `read_paper`.
        as_model: Take the results for those of this model of the paper, whatever their own says.
            Default: by the models' names.
        metric: Which accuracy, `"top1"` being the paper's as far as can be told; also which column
            to take the area of.
        rule: How the area under a curve is taken.

    Returns:
        One row per published number of the models at hand, in the order of the tables, then one per
        number of ours that has none: `table` (0 there), `model`, `task`, `kind`, `n_shots`,
        `method`, `direction`, `scale` under their published names; `paper`, `ours`, `difference`
        (ours − paper), NaN where one is missing; `note`; `found` (`"both"`, `"paper"`, `"ours"`);
        `our_model`, `our_task` and `our_cell`, our names for the cell.

    Raises:
        BadInput: nothing in common, two results for one cell, an unknown model.
        BadFile: see `read_paper`.
    """
    paper = read_paper(folder)
    frames = [results] if isinstance(results, pd.DataFrame) else list(results)
    _warn_of_other_protocol(frames)
    ours = _our_cells(frames, _forced_model(as_model, paper), metric, rule)
    of_models: Any = paper[paper["model"].isin(list(set(ours["model"])))]
    published = of_models.assign(printed=of_models["method"], place=range(len(of_models)))
    published["method"] = published["method"].replace(_SAME)
    merged: Any = published.merge(ours, on=_KEY, how="outer", sort=False)
    merged["method"] = merged["printed"].fillna(merged["method"])
    merged["found"] = "both"
    merged.loc[merged["paper"].isna(), "found"] = "ours"
    merged.loc[merged["our_cell"].isna(), "found"] = "paper"
    if not bool((merged["found"] == "both").any()):
        raise BadInput(_nothing_in_common(paper, ours, frames))
    merged["difference"] = merged["ours"] - merged["paper"]
    merged["table"] = merged["table"].fillna(0).astype(int)
    for name in ("note", "our_model", "our_task", "our_cell"):
        merged[name] = merged[name].fillna("")
    ordered = merged.sort_values(["place", "order"], na_position="last", kind="stable")
    return ordered[_OUT].reset_index(drop=True)


def _warn_of_other_protocol(frames: Sequence[pd.DataFrame]) -> None:
    """Warn where tasks share their names alone with the published ones, or marks are others."""
    own: list[str] = []
    for frame in frames:
        if "source" in frame:
            own += frame.loc[frame["source"] == "builtin", "task"].unique().tolist()
    if own:
        warnings.warn(
            f"the results for {', '.join(own[:3])}{', …' * (len(own) > 3)} are on ra_lens's own "
            "word lists, not on the paper's data. Run with source='download' or a folder of the "
            "published files (--source) to compare like with like.",
            RALensWarning,
            stacklevel=3,
        )
    if any("accuracy" in frame and "answer" in set(frame["accuracy"]) for frame in frames):
        warnings.warn(
            "some results were marked by the whole answer (accuracy='answer'); the published "
            "numbers go by its first token, as far as can be told.",
            RALensWarning,
            stacklevel=3,
        )


def count_cells(compared: pd.DataFrame) -> dict[str, int]:
    """Count the cells that are on both sides, only in the paper, and only in the results."""
    return {side: int((compared["found"] == side).sum()) for side in ("both", "paper", "ours")}


def _read_table(path: Path) -> pd.DataFrame:
    try:
        frame: Any = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        problem = " ".join(str(error).split())[:200]
        raise BadFile(f"{path} cannot be read as a table: {problem}") from error
    metrics = [name for name in ("auc", "accuracy") if name in frame]
    missing = [name for name in _NEEDED if name not in frame]
    if missing or len(metrics) != 1 or ("accuracy" in metrics and "scale" not in frame):
        wanted = f"{', '.join(_NEEDED)} and either auc, or scale and accuracy"
        raise BadFile(f"{path} has columns {', '.join(frame.columns)}; needed are {wanted}.")
    out = frame[_NEEDED].copy()
    out["kind"] = out["kind"].str.replace("icl_same_length", "icl")
    out["metric"] = metrics[0]
    for name in ("table", "n_shots", "paper", "scale"):
        source = metrics[0] if name == "paper" else name
        texts = frame[source] if source in frame else pd.Series("", index=frame.index)
        out[name] = _numbers(texts, path, source, optional=name == "scale")
        if name in ("table", "n_shots") and bool((out[name] % 1 != 0).any()):
            raise BadFile(f"{path}: found a fraction as {name}; it must be a whole number.")
    return out.astype({"table": int, "n_shots": int})


def _numbers(texts: Any, path: Path, column: str, *, optional: bool) -> Any:
    converted: Any = pd.to_numeric(texts.where(texts != ""), errors="coerce")
    numbers = converted.astype(float)
    wrong = numbers.isna() & ~((texts == "") & optional)
    if bool(wrong.any()):
        row = int(wrong.to_numpy().argmax())
        raise BadFile(
            f"{path}, line {row + 2}: found {column}={texts.iloc[row]!r}; a number is needed."
        )
    return numbers


def _forced_model(as_model: str | None, paper: pd.DataFrame) -> str | None:
    if as_model is None:
        return None
    known = list(dict.fromkeys(paper["model"]))
    for name in known:
        if as_model.lower() == name.lower() or paper_model(as_model) == name:
            return name
    raise BadInput(f"found as_model={as_model!r}; the published models are {', '.join(known)}.")


def _our_cells(
    frames: Sequence[pd.DataFrame], forced: str | None, metric: Metric, rule: Rule
) -> pd.DataFrame:
    """Put our numbers under the paper's names, one row per cell."""
    parts: list[Any] = []
    for frame in frames:
        if not {"experiment", "model", "task", "kind", "n_shots"} <= set(frame.columns):
            raise BadInput(
                "found a table that is no result of an experiment. Give those of "
                "perturbation_test() and patching_sweep()."
            )
        for experiment, cells in (("perturbation", _auc_cells), ("patching", _patching_cells)):
            of_kind: Any = frame[frame["experiment"] == experiment]
            if not of_kind.empty:
                parts.append(cells(of_kind, metric, rule))
    if not parts:
        raise BadInput(
            "found no results to compare: the paper's tables hold perturbation tests and patching "
            "sweeps. Give results of perturbation_test() or patching_sweep()."
        )
    ours: Any = pd.concat(parts, ignore_index=True)
    ours["our_model"], ours["our_task"] = ours["model"], ours["task"]
    ours["model"] = [forced or paper_model(name) or name for name in ours["our_model"]]
    ours["task"] = [_LENGTH.sub("", name.rpartition("/")[2]) for name in ours["our_task"]]
    ours["order"] = range(len(ours))
    twice: Any = ours[ours.duplicated(_KEY, keep=False)]
    if not twice.empty:
        one, cell = twice.iloc[0], ["task", "n_shots", "our_cell"]
        of: Any = twice[(twice[cell] == one[cell]).all(axis=1)]
        raise BadInput(
            f"found {len(of)} results for {one['task']}, {one['n_shots']} shots, {one['our_cell']} "
            f"(of {', '.join(sorted(set(of['our_model'] + ', ' + of['our_task'])))}); give one."
        )
    return ours


def _auc_cells(frame: Any, metric: Metric, rule: Rule) -> Any:
    areas: Any = area_under_curve(frame, metric=metric, rule=rule)
    ordered = list(zip(areas["method"], areas["direction"], strict=True))
    return areas[["model", "task", "kind", "n_shots"]].assign(
        method=[_METHODS.get(method, method) for method, _ in ordered],
        direction=[_TURNED.get(d, d) if m in ("cm1", "index") else d for m, d in ordered],
        scale=float("nan"),
        metric="auc",
        ours=areas["auc"],
        our_cell=[m if d == "none" else f"{m} {d}" for m, d in ordered],
    )


def _patching_cells(frame: Any, metric: Metric, _rule: Rule) -> Any:
    problem = problem_of(frame, ["model", "task", "kind", "n_shots", "map", "scale", metric])
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of patching_sweep().")
    frame = mean_over_questions(frame)
    scales = frame["scale"].astype(float)
    return frame[["model", "task", "kind", "n_shots"]].assign(
        method=[_MAPS.get(name, name) for name in frame["map"]],
        direction="none",
        scale=scales,
        metric="accuracy",
        ours=frame[metric],
        our_cell=[
            "unpatched" if name == "none" else f"{name} × {scale:+g}".replace("-", "−")
            for name, scale in zip(frame["map"], scales, strict=True)
        ],
    )


def _nothing_in_common(
    paper: pd.DataFrame, ours: pd.DataFrame, frames: Iterable[pd.DataFrame]
) -> str:
    models = list(dict.fromkeys(model for frame in frames for model in frame["model"]))
    known: Any = paper[paper["model"].isin(list(set(ours["model"])))]
    if known.empty:
        published = ", ".join(dict.fromkeys(paper["model"]))
        return (
            f"nothing to compare: the results are of {', '.join(models)}, the published numbers of "
            f"{published}. Say which to lay it beside with as_model (--as-model)."
        )

    def said(frame: Any) -> str:
        cells = frame.groupby(["metric", "kind"], sort=False)
        return "; ".join(
            f"{metric} of {kind} tasks {', '.join(dict.fromkeys(group['task']))} with "
            f"{', '.join(str(n) for n in sorted(set(group['n_shots'])))} shots"
            for (metric, kind), group in cells
        )

    return f"nothing to compare: the results have {said(ours)}. Published: {said(known)}."
