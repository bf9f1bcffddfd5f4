"""Tables of results: read and written whole, and checked for the columns that are needed.

A table may have been through other hands: a column dropped, `n/a` typed for a number, a cell left
empty. What is wrong is told in words that go on from "a table ...".

`table_rows` and `best_of_rows` say which rows a table shows, means below the tasks, and which
numbers in them are the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ra_lens.errors import BadFile, BadInput
from ra_lens.files import FileKind, check_input, check_output, user_path, whole_file
from ra_lens.text import shorten

_NUMBERS = frozenset(
    {"n_shots", "draw", "share", "top1", "top2", "top3", "logit_diff", "answer_diff", "scale",
     "auc", "layer", "head", "score", "rank", "question", "window", "query", "measured",
     "predicted", "auroc", "average_precision", "kl", "top1_same"}
)  # fmt: skip
_NUMBERS_BEGIN = ("score_", "effect_", "logit_diff_effect_", "seconds_")  # and a name
# Measures of a model that may have given none here and there; everything else has a value in
# every row, and what has none would silently be left out of a mean.
_MAY_BE_UNKNOWN = frozenset({"logit_diff", "answer_diff", "score", "auc"})


def problem_of(frame: object, columns: Sequence[str], *, rows: bool = False) -> str | None:
    """Say why columns of a table cannot be used: missing, text for numbers, empty; None if not.

    Rows are counted from 1, below the names of the columns. The `scale` of the unpatched model
    (`map` is `none`) is empty, as it should be. With `rows` there must be some.
    """
    if not isinstance(frame, pd.DataFrame):
        return f"that is a {type(frame).__name__}, not a DataFrame"
    missing = [name for name in columns if name not in frame]
    if missing:
        return f"without {', '.join(map(repr, missing))}"
    if rows and frame.empty:
        return "without rows"
    return next(filter(None, (_problem_in(frame, name) for name in columns)), None)


def _problem_in(frame: pd.DataFrame, name: str) -> str | None:
    values: Any = frame[name]
    of_it = np.ones(len(frame), dtype=bool)
    if name == "scale" and "map" in frame:
        of_it = (frame["map"] != "none").to_numpy(dtype=bool)
    if not of_it.any():
        return None
    numbers = name in _NUMBERS or name.startswith(_NUMBERS_BEGIN)
    if numbers and not pd.api.types.is_numeric_dtype(values):
        rows = np.flatnonzero(of_it & values.notna().to_numpy()).tolist()
        # A column with one word in it is read as text throughout: name the word.
        words = [row for row in rows if not _is_number(values.iloc[row])]
        texts = [row for row in rows if isinstance(values.iloc[row], str)]
        for row in [*words, *texts][:1]:
            return f"with the text {values.iloc[row]!r} for {name} in row {row + 1}, not a number"
    unknown = of_it & values.isna().to_numpy()
    if bool((unknown == of_it).all()):
        return f"in which {name!r} is empty"
    if name not in _MAY_BE_UNKNOWN and unknown.any():
        return f"without a value for {name} in row {int(unknown.argmax()) + 1}"
    return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def mean_over_questions(frame: pd.DataFrame) -> pd.DataFrame:
    """Take the mean of what was measured over the questions of an experiment.

    Args:
        frame: From `perturbation_test`, `patching_sweep` or `patching_ablations` with
            `each_question=True`, or several of them concatenated.

    Returns:
        What they give without, a row for all questions together. A table without a column
        `question` comes back as it is.
    """
    if "question" not in frame:
        return frame
    measured = [name for name in _ALL_MARKS if name in frame]
    keys = [name for name in _TELLS_APART if name in frame]
    others = [name for name in frame if name not in (*measured, *keys, "question")]
    groups = frame.groupby(keys, sort=False, dropna=False)
    means: Any = groups.agg({**dict.fromkeys(measured, "mean"), **dict.fromkeys(others, "first")})
    return means.reset_index()[[name for name in frame if name != "question"]]


def table_rows(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Give the rows of the table: name to the tasks averaged; an empty list is a gap.

    Tasks stand alone, those learnt in context first; means follow where there are several tasks,
    of each kind first where there are both kinds and several tasks of it.
    """
    kinds: dict[str, list[str]] = {}
    for kind in ("icl", "natural"):
        kinds[kind] = list(dict.fromkeys(frame[frame["kind"] == kind]["task"].astype(str)))
    tasks = [task for of_kind in kinds.values() for task in of_kind]
    tasks += [t for t in dict.fromkeys(frame["task"].astype(str)) if t not in tasks]
    rows = {shorten(task, 30): [task] for task in tasks}
    if len(tasks) > 1:
        rows[" "] = []
        for kind, of_kind in kinds.items():
            if 1 < len(of_kind) < len(tasks):
                rows[f"mean of {len(of_kind)} {kind}"] = of_kind
        rows[f"mean of {len(tasks)} tasks"] = tasks
    return rows


def best_of_rows(values: Float[np.ndarray, "row column"]) -> np.ndarray:
    """Mark the largest value of each row, ties included; none where all are the same."""
    known = np.where(np.isnan(values), -np.inf, values)
    largest = known.max(axis=1, keepdims=True)
    smallest = np.where(np.isnan(values), np.inf, values).min(axis=1, keepdims=True)
    return (known >= largest - 1e-9) & (largest > smallest + 1e-9)


_TEXTS = (
    "experiment", "model", "task", "kind", "method", "direction", "map", "label", "source",
    "format", "pairs_hash", "prompts_hash", "weights_hash", "settings_hash", "split", "at",
    "dtype", "device", "model_class", "ra_lens", "transformer_lens", "transformers", "torch",
    "accuracy", "prepend_bos", "what", "cut", "drawn", "keys", "query_token", "key_tokens",
    "steps_of", "circuit", "order", "true_heads", "found_by", "ablation", "variant", "scale_from",
)  # fmt: skip
# Columns with texts beside other values, and what these were: True and False beside tokens, numbers
# beside "auto".
_MIXED: dict[str, Callable[[str], object]] = {
    "prepend_bos": lambda text: {"True": True, "False": False}.get(text, text),
    "batch_size": lambda text: int(text) if text.isdecimal() else text,
}
_MARKS = ("top1", "top2", "top3", "logit_diff")
_ALL_MARKS = (*_MARKS, "answer_diff")  # the last where there is a wrong answer to compare with
# Columns of each experiment: those that tell its rows apart, and what it measures.
_NEEDED = {
    "ranking": ("model", "task", "kind", "n_shots", "method", "layer", "head"),
    "perturbation": ("model", "task", "kind", "n_shots", "method", "direction", "draw", "share"),
    "patching": ("model", "task", "kind", "n_shots", "map", "scale"),
    "ablations": (
        "model",
        "task",
        "kind",
        "n_shots",
        "ablation",
        "variant",
        "map",
        "scale_from",
        "scale",
    ),
    "knockout": (
        "model",
        "task",
        "kind",
        "n_shots",
        "question",
        "what",
        "cut",
        "drawn",
        "layer",
        "window",
        "head",
        "query",
        "keys",
    ),
    "circuit": ("model", "circuit", "method", "order", "draw"),
    "head effects": ("model", "task", "kind", "n_shots", "question", "layer", "head"),
    "faithfulness": ("model", "task", "kind", "n_shots", "method", "ablation"),
}
_TELLS_APART = (
    "experiment", "model", "task", "kind", "n_shots", "method", "direction", "draw", "share", "map",
    "scale", "ablation", "variant", "scale_from", "settings_hash",
)  # fmt: skip
_MEASURES = {
    "ranking": ("score", "rank"), "perturbation": _ALL_MARKS, "patching": _ALL_MARKS,
    "ablations": (*_MARKS, "kl", "top1_same"),
    "knockout": ("predicted", "measured"), "circuit": ("auroc", "average_precision"),
    "head effects": ("loss",), "faithfulness": ("spearman_signed", "spearman_abs"),
}  # fmt: skip
MEASURES = ("score", "rank", *_MARKS, "kl", "top1_same", "predicted", "measured")
"""Columns of what the experiments measure."""


def _is_table(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(256)
    return head.startswith(b"PAR1") or (b"\0" not in head and not head.lstrip().startswith(b"<"))


TABLE = FileKind("a table", _is_table, (".parquet", ".csv"))


def write_results(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a table of results as Parquet or CSV, by the ending of `path`; whole or not at all.

    Raises:
        BadInput: another ending, a path that cannot be written, or one that holds something else:
            a comparison does not replace an experiment, nor one experiment another.
    """
    if check_output(path, TABLE).exists() and (file := user_path(path)).stat().st_size > 0:
        try:
            there = _what(_read_table(file))
        except (ValueError, OSError):
            there = "something that cannot be read as a table"
        if there != _what(frame):
            raise BadInput(
                f"cannot write {path}: it holds {there}, and this is {_what(frame)}. Give another "
                "name, or delete it first."
            )
    with whole_file(path, TABLE) as temporary:
        if Path(path).suffix.lower() == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            _of_one_kind(frame).to_parquet(temporary, index=False)


def _of_one_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Write as text what stands beside texts in some columns; Parquet wants one kind."""
    for name in _MIXED:
        values = list(frame[name]) if name in frame else []
        if any(isinstance(value, str) for value in values):
            texts = [value if value is None or value != value else str(value) for value in values]
            frame = frame.assign(**{name: pd.Series(texts, index=frame.index, dtype=object)})
    return frame


def _as_it_was(frame: pd.DataFrame) -> pd.DataFrame:
    """Read what was written as text in these columns as what it was."""
    for name, read in _MIXED.items():
        column = frame.get(name)
        if column is not None and any(isinstance(value, str) for value in column):
            values = [read(value) if isinstance(value, str) else value for value in column]
            # Of bools alone it is a column of bools, as it was.
            frame = frame.assign(**{name: pd.Series(values, index=frame.index).infer_objects()})
    return frame


def _what(frame: pd.DataFrame) -> str:
    if {"paper", "ours", "difference"} <= set(frame):
        return "a comparison with the paper"
    if "experiment" not in frame:
        return "another table"
    return f"the results of an experiment ({', '.join(sorted(set(map(str, frame['experiment']))))})"


def read_results(path: str | Path, *, measures: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table written by `write_results`.

    Args:
        path: The file.
        measures: Columns that are wanted beside those that tell the rows apart, such as `top1`.

    Raises:
        BadFile: missing, damaged, or without the columns of an experiment, or with text or nothing
            where they should hold numbers.
    """
    path = user_path(path)
    check_input(path, "Give the results of ra-lens rank, perturb, patch, knockout, circuits.")
    try:
        frame = _read_table(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors are among them
        raise BadFile(f"{path} cannot be read as a table: {str(error)[:200]}") from error
    if "experiment" not in frame or "model" not in frame:
        raise BadFile(
            f"{path} is a table without the columns of an experiment (experiment, model, task, …). "
            "Give a file that ra-lens rank, perturb, patch, knockout or circuits wrote."
        )
    for experiment, needed in _NEEDED.items():
        part: Any = frame[frame["experiment"] == experiment]
        measured = [m for m in _MEASURES[experiment] if m in frame or m in measures]
        problem = None if part.empty else problem_of(part, [*needed, *measured])
        if problem is not None:
            raise BadFile(
                f"{path} is a table {problem}. Give the file as ra-lens rank, perturb, patch or "
                "knockout wrote it."
            )
    return frame


def _read_table(path: Path) -> pd.DataFrame:
    if path.suffix.lower() == ".csv":
        # Not "none" and "NA": they are names here. An empty cell is a missing number. Before its
        # version 3, pandas read numbers one digit short unless told otherwise.
        exact: dict[str, Any] = (
            {"float_precision": "round_trip"} if int(pd.__version__.split(".")[0]) < 3 else {}
        )
        texts = dict.fromkeys(_TEXTS, str)  # a hash may look like a number
        read = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=texts, **exact)
        return _as_it_was(read)
    return _as_it_was(pd.read_parquet(path))
