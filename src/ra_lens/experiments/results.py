"""Tables of results: one tidy frame per experiment; each row says how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ra_lens.errors import BadFile, BadInput
from ra_lens.experiments.journal import NOT_SETTINGS, differences, journal_path, settings_hash
from ra_lens.files import FileKind, check_input, check_output, user_path, whole_file
from ra_lens.model import Lens
from ra_lens.tables import problem_of
from ra_lens.tasks import Prompt

_TEXTS = (
    "experiment", "model", "task", "kind", "method", "direction", "map", "label", "source",
    "format", "pairs_hash", "prompts_hash", "weights_hash", "settings_hash", "split", "at",
    "dtype", "device", "model_class", "ra_lens", "transformer_lens", "transformers", "torch",
    "accuracy",
)  # fmt: skip
SETTINGS = "settings_hash"
_NEEDED = {
    "ranking": ("model", "task", "kind", "n_shots", "method", "layer", "head"),
    "perturbation": ("model", "task", "kind", "n_shots", "method", "direction", "draw", "share"),
    "patching": ("model", "task", "kind", "n_shots", "map", "scale"),
}
_MARKS = ("top1", "top2", "top3", "logit_diff")
_MEASURES = {"ranking": ("score", "rank"), "perturbation": _MARKS, "patching": _MARKS}
_OF_A_COMPARISON = {"paper", "ours", "difference"}


def _is_table(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(256)
    return head.startswith(b"PAR1") or (b"\0" not in head and not head.lstrip().startswith(b"<"))


TABLE = FileKind("a table", _is_table, (".parquet", ".csv"))


def check_results_path(path: str | Path, *, inputs: Iterable[Path] = ()) -> Path:
    """Find out, before any work, whether results can be written to `path`.

    Args:
        path: Where.
        inputs: Files that are read, which must not be written to.

    Raises:
        BadInput: neither `.parquet` nor `.csv`, something else than a table is there, or it cannot
            be written.
    """
    return check_output(path, TABLE, inputs=inputs)


def write_results(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a table of results as Parquet or CSV, by the ending of `path`; whole or not at all.

    Raises:
        BadInput: another ending, a path that cannot be written, or one that holds something else:
            a comparison does not replace an experiment, nor one experiment another.
    """
    if check_results_path(path).exists():
        _refuse_another_table(path, frame)
    with whole_file(path, TABLE) as temporary:
        if Path(path).suffix.lower() == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)


def _refuse_another_table(path: str | Path, frame: pd.DataFrame) -> None:
    file = user_path(path)
    if file.stat().st_size == 0:
        return
    try:
        there = _what(_read_table(file))
    except (ValueError, OSError):
        there = "something that cannot be read as a table"
    if there != _what(frame):
        raise BadInput(
            f"cannot write {path}: it holds {there}, and this is {_what(frame)}. Give another "
            "name, or delete it first."
        )


def _what(frame: pd.DataFrame) -> str:
    if set(frame) >= _OF_A_COMPARISON:
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
    check_input(path, "Give the results of ra-lens rank, perturb, patch.")
    try:
        frame = _read_table(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors are among them
        raise BadFile(f"{path} cannot be read as a table: {str(error)[:200]}") from error
    if "experiment" not in frame or "model" not in frame:
        raise BadFile(
            f"{path} is a table without the columns of an experiment (experiment, model, task, …). "
            "Give a file that ra-lens rank, perturb or patch wrote."
        )
    for experiment, needed in _NEEDED.items():
        part: Any = frame[frame["experiment"] == experiment]
        measured = [m for m in _MEASURES[experiment] if m in frame or m in measures]
        problem = None if part.empty else problem_of(part, [*needed, *measured])
        if problem is not None:
            raise BadFile(
                f"{path} is a table {problem}. Give the file as ra-lens rank, perturb or patch "
                "wrote it."
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
        return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=texts, **exact)
    return pd.read_parquet(path)


def finished_results(out: str | Path | None, settings: Mapping[str, Any]) -> pd.DataFrame | None:
    """Results that an earlier run with the same settings has written to `out`, if any.

    Raises:
        BadInput: there is a file, of something else; or settings that cannot be written down,
            whether there is a file or not.
    """
    wanted = settings_hash(dict(settings))
    if out is None or not check_results_path(out).exists():
        return None
    try:
        frame = read_results(out, measures=("score", "rank", *_MARKS))
    except BadFile as error:
        raise BadInput(f"{out} exists and is something else: {error} Give another name.") from error
    if SETTINGS not in frame or set(frame[SETTINGS]) != {wanted}:
        raise BadInput(
            f"{out} holds the results of a run with other settings ({_differences(frame, settings)}"
            "). Give another name, or delete it first."
        )
    journal_path(out).unlink(missing_ok=True)  # of a run killed just after it had written
    return frame


# Settings that are lists, by the column that shows them.
_COLUMNS = {
    "shots": "n_shots",
    "methods": "method",
    "directions": "direction",
    "kinds": "map",
    "scales": "scale",
}


def _differences(frame: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    there: dict[str, Any] = {}
    here: dict[str, Any] = {}
    unseen: list[str] = []
    for name, value in settings.items():
        if name in NOT_SETTINGS:
            continue
        if name == "tasks" and {"task", "source", "format", "pairs_hash"} <= set(frame):
            there[name], here[name] = _tasks(frame), [_of_task(task) for task in value]
            unseen.append("how the model's tokenizer reads the tasks")
        elif name == "methods" and "method" in frame:
            there[name] = _values(frame, "method")
            here[name] = [method["name"] for method in value]
            unseen.append("what the methods do")
        elif name in _COLUMNS and _values(frame, _COLUMNS[name]):
            there[name], here[name] = _values(frame, _COLUMNS[name]), value
        elif name == "n_test" and name in frame:  # there it is the number asked, not the limit
            asked = int(frame[name].max())
            if value is not None and asked > value:
                there[name], here[name] = asked, value
            else:
                unseen.append(f"n_test, here {value}, there at least {asked}")
        elif name not in frame:
            unseen.append(f"{name}, here {value}")
        else:
            there[name], here[name] = next(iter(_values(frame, name)), None), value
    return differences(there, here) or f"in what the table does not show: {'; '.join(unseen)}"


def _values(frame: pd.DataFrame, column: str) -> list[Any]:
    """The values of a column, in order, without those that say that there is none."""
    if column not in frame:
        return []
    values: Any = frame[column].dropna()
    return [value for value in dict.fromkeys(values.tolist()) if value != "none"]


def _tasks(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows: Any = frame[["task", "source", "format", "pairs_hash"]].drop_duplicates()
    return rows.rename(columns={"task": "name"}).to_dict("records")


def _of_task(task: Mapping[str, Any]) -> dict[str, Any]:
    return {name: task[name] for name in ("name", "source", "format", "pairs_hash")}


def as_frame(
    experiment: str, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> pd.DataFrame:
    """Make the table of an experiment: what it is and of which model, the rows, how it was made."""
    made = {name: value for name, value in settings.items() if not isinstance(value, list | dict)}
    first = {"experiment": experiment, "model": made.pop("model")}
    made.pop("experiment", None)
    made[SETTINGS] = settings_hash(dict(settings))
    # What a row says of itself counts: a setting may be an upper limit only (`n_test`).
    return pd.DataFrame(
        [{**first, **row, **{k: v for k, v in made.items() if k not in row}} for row in rows]
    )


def model_facts(lens: Lens) -> dict[str, Any]:
    """Which model, in which class and precision, with which versions of what runs it."""
    some = next(lens.module.parameters())
    return {
        "model": lens.name,
        "model_class": lens.kind,
        "dtype": str(some.dtype).removeprefix("torch."),
        "device": some.device.type,
        "weights_hash": weights_hash(lens.module),
        "value_biases_folded": lens.value_biases_folded,
        "ra_lens": version("ra-lens"),
        "transformer_lens": version("transformer-lens"),
        "transformers": version("transformers"),
        "torch": version("torch"),
    }


def weights_hash(model: nn.Module) -> str:
    """A short text that tells the weights of two models apart.

    Of each parameter: some numbers, and the sum of all absolute values, so that every change of
    more than about a part in ten million shows.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        n = values.numel()
        if n == 0:
            continue
        count = min(64, n)
        picked = [i * (n - 1) // max(count - 1, 1) for i in range(count)]
        numbers = values[torch.tensor(picked, device=values.device)].float().tolist()
        # Few digits: sums differ in the last ones with the number of threads.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = float(values.abs().sum(dtype=wide))
        digest.update(f"{name}{tuple(parameter.shape)}{numbers}{total:.6e}".encode())
    return digest.hexdigest()


def prompts_hash(*groups: Sequence[Prompt]) -> str:
    """A short text that tells sets of prompts apart, by what the model reads and has to answer."""
    digest = hashlib.blake2b(digest_size=8)
    for prompts in groups:
        for prompt in prompts:
            digest.update(f"{prompt.text}\x1f{prompt.answer}\x1e".encode())
        digest.update(b"\x1d")
    return digest.hexdigest()
