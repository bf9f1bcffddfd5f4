"""Results of experiments in a terminal and as JSON.

Tables fit 80 columns: a cell of the perturbation test is `.39/.05`, an order and its reverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from ra_lens.cli import show
from ra_lens.experiments.paper import count_cells
from ra_lens.figures.style import method_styles, metric_name
from ra_lens.questions import METRICS
from ra_lens.scales import PAPER_SCALE
from ra_lens.tables import best_of_rows, table_rows
from ra_lens.text import scale_name, short, shots_name

_METRIC_COLUMNS = ["top1", "top2", "top3", "logit_diff"]
_VARY = {"experiment", "task", "kind", "n_shots", "method", "direction", "draw", "share", "score",
         "heads_kept", "map", "scale", "layer", "head", "label", "rank", "prompts_hash", "n_test",
         "n_tokens", "n_first_tokens", "train_loss", "train_loss_unpatched",
         "ablation", "variant", "scale_from", "kl", "top1_same",
         "question", "what", "cut", "drawn", "window", "query", "keys", "key", "query_token",
         "key_tokens", "first", "loss", "measured", "predicted", "a_grad", "minus_ra", "input_grad",
         "pattern", "grad", "value", "end", "trapezoid",
         "answer_diff", *_METRIC_COLUMNS}  # fmt: skip
_WORDS = ("", "method", "heads", "task", "order", "as", "variant")  # columns that hold no numbers
_MAPS = {"ra": "RA", "pattern": "FA", "shuffled": "RA shuffled", "grad": "G as large as RA",
         "centred_grad": "G centred", "a_grad": "A⊙G"}  # fmt: skip

# ---- all experiments ----------------------------------------------------------------------------


def print_facts(frame: Any, facts: Mapping[str, Any], out: str | None, figure: Path | None) -> None:
    """Print an experiment as one JSON object: how it was made, and what it gave."""
    settings = {
        str(name): _json_value(frame[name].iloc[0])
        for name in frame
        if name not in _VARY and frame[name].nunique(dropna=False) == 1
    }
    show.print_json(
        {
            "experiment": frame["experiment"].iloc[0],
            **settings,
            "tasks": list(dict.fromkeys(frame["task"].astype(str))),
            "shots": _shots(frame),
            **facts,
            "out": out,
            "figure": None if figure is None else str(figure),
        }
    )


def print_files(out: str | Path | None, figure: Path | None = None) -> None:
    """Say which files were written."""
    for name, path in (("Results", out), ("Figure", figure)):
        if path is not None:
            show.new_console().print(f"{name}: {path}", soft_wrap=True)


# ---- rankings -----------------------------------------------------------------------------------


def print_ranking(frame: pd.DataFrame, *, top: int) -> None:
    """Print the top heads of each task, number of shots and method."""
    for (task, n), part in grouped(frame, ["task", "n_shots"]):
        table = table_of(f"{task}, {shots_name(int(n))}: top heads", "method", "heads")
        for method, style in method_styles(part["method"]).items():
            heads = _top(part[part["method"] == method], top)
            table.add_row(style.name, Text("  ".join(heads["label"])))
        print_parts(table, "")


def ranking_facts(frame: pd.DataFrame, *, top: int) -> dict[str, Any]:
    """Give the top heads of each task, number of shots and method."""
    rankings = [
        {
            "task": task,
            "kind": part["kind"].iloc[0],
            "n_shots": int(n),
            "method": method,
            "heads": records_of(_top(part, top)[["rank", "layer", "head", "label", "score"]]),
        }
        for (task, n, method), part in grouped(frame, ["task", "n_shots", "method"])
    ]
    return {"rankings": rankings}


def _top(part: Any, top: int) -> Any:
    return part.sort_values("rank").head(top)


# ---- circuits -----------------------------------------------------------------------------------

_LOCALISATION = ("auroc", "average_precision", "to_verify")


def print_circuit(frame: pd.DataFrame) -> None:
    """Print how well each method finds the true heads, random orders as their mean."""
    first = frame.iloc[0]
    title = (
        f"{first['circuit']}: {int(first['n_true'])} of {int(first['n_heads'])} heads "
        f"({first['found_by']})"
    )
    table = table_of(title, "method", "order", "AUROC", "precision", "to verify", "seconds")
    means = _circuit_means(frame)
    styles = method_styles(frame["method"])
    for row in means.sort_values("auroc", ascending=False, kind="stable").itertuples():
        values: Any = row
        table.add_row(
            styles[values.method].name,
            values.order,
            f"{values.auroc:.3f}",
            f"{values.average_precision:.3f}",
            f"{values.to_verify:.0f}",
            f"{values.seconds:.1f}",
        )
    print_parts(table, "")
    notes = (
        f"True heads: {first['true_heads']}. The model answers {first['top1']:.0%} of "
        f"{int(first['n_rank'])} prompts right. precision: average precision; to verify: heads to "
        "look at, the largest score first, until all are found."
    )
    print_parts(Text(notes, style="dim"))


def print_circuit_json(frame: pd.DataFrame, *, out: Path | None) -> None:
    """Print the test of a circuit as one JSON object."""
    first = frame.iloc[0]
    about = ("experiment", "model", "circuit", "found_by", "n_true", "n_heads", "n_rank", "top1")
    facts = {name: _json_value(first[name]) for name in about}
    show.print_json(
        {
            **facts,
            "true_heads": str(first["true_heads"]).split(" "),
            "methods": records_of(_circuit_means(frame)),
            "out": None if out is None else str(out),
        }
    )


def _circuit_means(frame: pd.DataFrame) -> Any:
    """Give the mean over draws of each method and order."""
    columns = [*_LOCALISATION, "auroc_pessimistic", "seconds"]
    means: Any = frame.groupby(["method", "order"], sort=False)[columns].mean()
    return means.reset_index()


# ---- perturbation test --------------------------------------------------------------------------


def print_areas(frame: pd.DataFrame, areas: pd.DataFrame, *, metric: str) -> None:
    """Print the areas under the curves: rows are tasks, or numbers of shots of a single task."""
    title = f"Area under the perturbation curve: {metric_name(frame, metric)}"
    print_parts(Text(title, style="bold"))
    rows, shots = table_rows(areas), _shots(areas)
    styles = method_styles(areas["method"])
    names = [style.name for style in styles.values()]
    if len(rows) == 1:
        [(title, tasks)] = rows.items()
        tables = {title: {shots_name(n): (n, tasks) for n in shots}}
    else:
        tables = {shots_name(n): {row: (n, tasks) for row, tasks in rows.items()} for n in shots}
    for title, lines in tables.items():
        table = table_of(title, "", *names, "all heads")
        for row, (n, tasks) in lines.items():
            if not tasks:
                table.add_section()
                continue
            values = [_values(areas, method, n, tasks) for method in styles]
            best = best_of_rows(np.array([[max(both, default=math.nan) for both in values]]))[0]
            cells = [
                Text("/".join(map(short, both)), style="bold" if bold else "")
                for both, bold in zip(values, best, strict=True)
            ]
            full = _mean_of(frame[frame["share"] == 1.0], metric, n, tasks)
            table.add_row(Text(row), *cells, short(full))
        print_parts(table, "")
    draws = int(areas["draws"].max())
    random = f" Random: mean of {draws} orders." if draws > 1 else ""
    notes = f"Order / its reverse; bold: largest of the row.{random} all heads: no head masked."
    print_parts(Text(notes, style="dim"))


def areas_facts(
    frame: pd.DataFrame, areas: pd.DataFrame, *, metric: str, rule: str
) -> dict[str, Any]:
    """Give the areas, their means over the tasks, and what the whole model does."""
    cell = ["n_shots", "method", "direction"]
    means = areas.groupby(cell, sort=False).agg(auc=("auc", "mean"), tasks=("task", "nunique"))
    full: Any = frame[frame["share"] == 1.0]
    columns = ["task", "kind", "n_shots", *_METRIC_COLUMNS, *_answer_columns(frame)]
    return {
        "metric": metric,
        "auc_rule": rule,
        "auc": records_of(areas.drop(columns="model")),
        "means": records_of(means.reset_index()),
        "all_heads": records_of(full.drop_duplicates(["task", "n_shots"])[columns]),
    }


def _values(areas: Any, method: str, n: int, tasks: Sequence[str]) -> list[float]:
    """Give a method's areas: of its order and the reverse, or of random orders."""
    of: Any = areas[areas["method"] == method]
    values = [
        _mean_of(of[of["direction"] == direction], "auc", n, tasks)
        for direction in ("none", "forward", "reversed")
    ]
    return [value for value in values if not math.isnan(value)]


# ---- patching sweep -----------------------------------------------------------------------------


def print_sweep(frame: pd.DataFrame, *, metric: str) -> None:
    """Print accuracy unpatched and patched, at the paper's scales and at the best ones."""
    rows, shots, columns = table_rows(frame), _shots(frame), _columns(frame)
    print_parts(Text(f"Attention patching: {metric_name(frame, metric)}", style="bold"))
    unpatched: Any = frame[frame["map"] == "none"]
    beside = f"unpatched {'/'.join(map(str, shots))}"
    for n in shots:
        table = table_of(f"{shots_name(n)}, patched", "", beside, *columns)
        for row, tasks in rows.items():
            if not tasks:
                table.add_section()
                continue
            part: Any = frame[(frame["n_shots"] == n) & frame["task"].isin(tasks)]
            plainly = [_number(_mean_of(unpatched, metric, m, tasks), metric) for m in shots]
            cells = [_cell(part, metric, kind, scale) for kind, scale in columns.values()]
            table.add_row(Text(row), "/".join(plainly), *cells)
        print_parts(table, "")
    print_parts(Text(f"{beside}: without a map, with so many shots.", style="dim"))
    if _found(frame):
        note = (
            "found: at the scale of the smallest loss on the training questions, by task and shots."
        )
        print_parts(Text(note, style="dim"))
    elif any(scale is None for _, scale in columns.values()):
        note = "best: the scale that is best on these same test questions."
        print_parts(Text(note, style="dim"))


def sweep_facts(frame: pd.DataFrame, *, metric: str) -> dict[str, Any]:
    """Give every cell of a sweep, and the means over the tasks."""
    cell = ["n_shots", "map", "scale"]
    means = frame.groupby(cell, sort=False, dropna=False).agg(
        **{metric: (metric, "mean")}, tasks=("task", "nunique")
    )
    answers = _answer_columns(frame)
    of_scale = ["train_loss", "train_loss_unpatched"] if _found(frame) else []
    columns = ["task", "kind", *cell, *_METRIC_COLUMNS, "n_test", "n_tokens", *answers, *of_scale]
    return {
        "metric": metric,
        "cells": records_of(frame[columns]),
        "means": records_of(means.reset_index()),
    }


def _columns(frame: Any) -> dict[str, tuple[str, float | None]]:
    """Name the columns: all scales where they are few, else the paper's and the best."""
    columns: dict[str, tuple[str, float | None]] = {}
    for kind, name in _MAPS.items():
        scales = sorted({float(s) for s in frame[frame["map"] == kind]["scale"]})
        if not scales:
            continue
        if _found(frame):
            columns[f"{name} found"] = (kind, None)
            continue
        few = len(scales) <= 3
        shown = scales if few else [s for s in scales if s == PAPER_SCALE.get(kind)]
        columns |= {f"{name} {scale_name(s)}": (kind, s) for s in shown}
        if not few:
            columns[f"{name} best"] = (kind, None)
    return columns


def _found(frame: Any) -> bool:
    """Whether each scale was found on training questions."""
    return "train_loss" in frame


def _cell(part: Any, metric: str, kind: str, scale: float | None) -> str:
    if _found(part):
        of_map: Any = part[part["map"] == kind]
        scales = of_map["scale"].unique().tolist()
        at = f" at {scale_name(scales[0])}" if len(scales) == 1 else ""
        return f"{_number(float(of_map[metric].mean()), metric)}{at}"
    means = part[part["map"] == kind].groupby("scale")[metric].mean()
    if scale is not None:
        return _number(means.get(scale, math.nan), metric)
    if means.empty:
        return ""
    # Of several best scales, the one nearest to none.
    best = min(means[means >= means.max() - 1e-9].index, key=abs)
    return f"{_number(means[best], metric)} at {scale_name(best)}"


# ---- ablations of patching ----------------------------------------------------------------------

_SCALE_HEADS = {"paper": "at −30 (FA +1)", "best": "at its best scale"}


def print_effects(effects: pd.DataFrame) -> None:
    """Print what each variant of a patch gives, and what it does to unrelated text."""
    metric = str(effects["metric"].iloc[0])
    ways = [way for way in _SCALE_HEADS if way in set(effects["scale_from"])]
    print_parts(Text(f"Ablations of attention patching: {METRICS[metric]}", style="bold"))
    for (n,), of_shots in grouped(effects, ["n_shots"]):
        heads = [name for way in ways for name in (_SCALE_HEADS[way], f"KL {way}")]
        table = table_of(shots_name(int(n)), "variant", *heads)
        [unpatched] = of_shots[of_shots["ablation"] == "none"]["value"].tolist()
        plainly = [cell for _ in ways for cell in (_number(float(unpatched), metric), "0")]
        table.add_row(Text("unpatched"), *plainly)
        patched = of_shots[of_shots["ablation"] != "none"]
        before = "whole"
        for (ablation, variant), part in grouped(patched, ["ablation", "variant"]):
            if ablation != before:
                table.add_section()
            before = ablation
            by_way = part.set_index("scale_from")
            cells: list[str] = []
            for way in ways:
                row = by_way.loc[way]
                cells += [_effect_cell(row, metric, found=way == "best"), f"{row['kl']:.2g}"]
            table.add_row(Text(str(variant)), *cells)
        print_parts(table, "")
    note = (
        "Mean over the tasks, with intervals where there is a row for each question "
        "(--each-question). KL: what the patch does to unrelated text, nats per token."
    )
    print_parts(Text(note, style="dim"))


def effects_facts(effects: pd.DataFrame) -> dict[str, Any]:
    """Give every number of the summed up ablations."""
    columns = ["metric", "level", "model"]
    return {
        "metric": effects["metric"].iloc[0],
        "level": float(effects["level"].iloc[0]),
        "variants": records_of(effects.drop(columns=columns)),
    }


def _effect_cell(row: Any, metric: str, *, found: bool) -> str:
    """A mean, its interval if any, and the scale where it was found."""
    low, high = (_number(float(row[end]), metric) for end in ("low", "high"))
    interval = f" {low}–{high}" if low and high else ""
    least, most = float(row["scale_low"]), float(row["scale_high"])
    scales = scale_name(least) if least == most else f"{scale_name(least)} to {scale_name(most)}"
    return f"{_number(float(row['value']), metric)}{interval}{f' at {scales}' * found}"


# ---- knockouts ----------------------------------------------------------------------------------


def print_agreement(frame: pd.DataFrame, found: pd.DataFrame) -> None:
    """Print how well each forecast agrees with what was measured, a table for each kind of cut."""
    print_parts(Text("Knockouts, foretold and measured: Spearman’s ρ", style="bold"))
    for cut, of_cut in grouped(found, ["cut"]):
        [cut] = cut if isinstance(cut, tuple) else [cut]
        groups = [group for group, _ in grouped(of_cut, ["what", "window"])]
        heads = {group: _cuts_name(*group) for group in groups}
        table = table_of(f"{cut} cuts", "method", *heads.values())
        for label, part in grouped(of_cut, ["label"]):
            [label] = label if isinstance(label, tuple) else [label]
            by_group = part.set_index(["what", "window"])["spearman"]
            cells = [_number(float(by_group.get(group, math.nan)), "") for group in groups]
            table.add_row(Text(str(label)), *cells)
        table.add_section()
        first = of_cut[of_cut["method"] == "predicted"].set_index(["what", "window"])
        for name, column in (("90 % of foretold", "spearman"), ("its signs", "sign")):
            cells = [_agreement_cell(first.loc[group], column) for group in groups]
            table.add_row(Text(name), *cells)
        table.add_row(Text("cuts"), *(str(int(first.loc[group]["n"])) for group in groups))
        print_parts(table, "")
    prompts = len(frame[["task", "n_shots", "question"]].drop_duplicates())
    note = (
        f"{prompts} prompts. signs: share that is right where the loss changes by more than .01. "
        "Methods without a sign (A, |G|, A·‖v W_O‖) against the size of the change."
    )
    print_parts(Text(note, style="dim"))


def agreement_facts(frame: pd.DataFrame, found: pd.DataFrame) -> dict[str, Any]:
    """Give every number of the agreement, and how many cuts were made of how many prompts."""
    prompts = frame[["task", "n_shots", "question"]].drop_duplicates()
    return {"n_cuts": len(frame), "n_prompts": len(prompts), "agreement": records_of(found)}


def _cuts_name(what: str, window: int) -> str:
    return "edges" if what == "edge" else f"sets, {window} layer{'s' * bool(window != 1)}"


def _agreement_cell(row: Any, column: str) -> str:
    """An interval of ρ, or the share of right signs; nothing where there is none."""
    if column == "sign":
        return _number(float(row["sign"]), "")
    ends = [_number(float(row[f"{column}_{end}"]), "") for end in ("low", "high")]
    return "" if not all(ends) else "–".join(ends)


# ---- comparison with published numbers ----------------------------------------------------------


def print_comparison(compared: pd.DataFrame, *, every: bool) -> None:
    """Print published numbers and ours, table by table."""
    both: Any = compared[compared["found"] == "both"]
    for (place, model), part in grouped(compared if every else both, ["table", "model"]):
        name = f"Table {place}, {model}" if place else f"Not published, {model}"
        table = table_of(name, "task", "shots", "order", "paper", "ours", "difference", "as")
        for row in part.to_dict("records"):
            table.add_row(
                Text(row["task"]),
                str(row["n_shots"]),
                Text(_order(row)),
                _number(row["paper"], "auc"),
                _number(row["ours"], "auc"),
                "" if math.isnan(row["difference"]) else f"{row['difference']:+.2f}",
                Text(row["our_cell"]),
            )
        print_parts(table, "")
    counts = count_cells(compared)
    average = float(both["difference"].abs().mean())
    differing = "" if math.isnan(average) else f", differing by {average:.3f} on average"
    text = (
        f"{counts['both']} published numbers with a result{differing}; {counts['paper']} of these "
        f"models without a result; {counts['ours']} results without a published number"
    )
    print_parts(Text(text + ("." if every else " (--all lists them)."), style="dim"))


def print_comparison_json(compared: pd.DataFrame, *, out: Path | None) -> None:
    """Print every cell as JSON."""
    show.print_json(
        {
            "ra_lens": version("ra-lens"),
            "counts": count_cells(compared),
            "cells": records_of(compared),
            "out": None if out is None else str(out),
        }
    )


def _order(row: Mapping[str, Any]) -> str:
    scale = "" if math.isnan(row["scale"]) else f" {scale_name(row['scale'])}"
    return f"{row['method']}{' reversed' if row['direction'] == 'reversed' else ''}{scale}"


# ---- tables and values --------------------------------------------------------------------------


def print_parts(*parts: Text | Table | str) -> None:
    """Print tables and notes one below the other."""
    console = show.new_console()
    for part in parts:
        console.print(part)


def table_of(title: str, *columns: str) -> Table:
    """Make a table whose columns of numbers are flush right."""
    return show.new_table(*columns, right=set(columns) - set(_WORDS), title=title)


def grouped(frame: Any, by: list[str]) -> list[tuple[Any, Any]]:
    """Divide a frame by some columns, in the order of its rows."""
    return list(frame.groupby(by, sort=False))


def _shots(frame: Any) -> list[int]:
    return sorted({int(n) for n in frame["n_shots"]})


def _answer_columns(frame: Any) -> list[str]:
    """Name the column that tells how answers begin; files of earlier versions lack it."""
    return ["n_first_tokens"] if "n_first_tokens" in frame else []


def _mean_of(frame: Any, column: str, n: int, tasks: Sequence[str]) -> float:
    """Give the mean over tasks with n shots; NaN where there are none."""
    part = frame[(frame["n_shots"] == n) & frame["task"].isin(list(tasks))]
    return float(part.groupby("task")[column].mean().mean()) if len(part) else math.nan


def _number(value: float, metric: str) -> str:
    """Write a value in few characters; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.2f}" if metric in ("logit_diff", "answer_diff") else short(value)


def records_of(frame: Any) -> list[dict[str, Any]]:
    """Give the rows of a frame as JSON has them: NaN is null."""
    return [
        {str(name): _json_value(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
