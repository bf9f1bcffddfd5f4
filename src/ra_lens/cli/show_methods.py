"""A comparison of ranking methods in a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.text import Text

from ra_lens.cli.show_results import grouped, print_parts, records_of, table_of
from ra_lens.figures.style import method_styles
from ra_lens.text import short, shots_name

_AWAY = {"zero": "zeroed", "mean": "at its mean", "resample": "resampled"}


def print_faithfulness(found: pd.DataFrame, ks: Sequence[int]) -> None:
    """Print how well each method foretold the effects, a table for each cell and ablation.

    Of the numbers of heads `ks` it shows the largest that is no more than a quarter of all.
    """
    k = max((k for k in ks if 4 * k <= int(found["n_heads"].iloc[0])), default=min(ks))
    styles = method_styles(found["method"])
    for (task, n, ablation), part in grouped(found, ["task", "n_shots", "ablation"]):
        title = f"{task}, {shots_name(int(n))}: head {_AWAY.get(ablation, ablation)}"
        table = table_of(
            title, "method", "ρ signed", "ρ size", "other half", f"first {k}", "stable", "passes"
        )
        for row in part.sort_values("spearman_signed", ascending=False).itertuples():
            values: Any = row
            table.add_row(
                styles[values.method].name,
                _number(values.spearman_signed),
                _number(values.spearman_abs),
                f"{_number(values.cross_half_signed)} {_number(values.cross_half_abs)}",
                f"{_number(getattr(values, f'precision_signed_{k}'))} "
                f"{_number(getattr(values, f'precision_abs_{k}'))}",
                _number(getattr(values, f"jaccard_{k}")),
                _passes(values),
            )
        first = part.iloc[0]
        table.add_section()
        signed, size = first["effects_split_half_signed"], first["effects_split_half_abs"]
        told = f"{_number(signed)} {_number(size)}"
        table.add_row("exact effects", "", "", told, "", "", "")
        print_parts(table, "")
    first = found.iloc[0]
    note = (
        f"{int(first['n_prompts'])} prompts, {int(first['n_heads'])} heads. ρ: Spearman's, of the "
        "scores with the mean rise of the loss without a head, and with its mean size, on the same "
        "prompts; other half: both, of the scores on half of the prompts with the effects on the "
        "others, that is on new prompts; its last row: of the effects, or their sizes, on half of "
        "them; first "
        f"{k}: share of the first {k} heads that are among the {k} of largest effect, and of "
        f"largest size (by chance {short(k / int(first['n_heads']))}); stable: overlap of the "
        f"first {k} by two halves of the prompts; passes: forward + backward, that all took. "
        "Which heads suffice is another question: ra-lens perturb."
    )
    print_parts(Text(note, style="dim"))


def faithfulness_facts(found: pd.DataFrame) -> dict[str, Any]:
    """Give every number of the comparison."""
    return {"agreement": records_of(found)}


def _passes(row: Any) -> str:
    forwards, backwards = row.forwards, row.backwards
    if forwards != forwards:  # nobody said
        return "?"
    return f"{forwards:.0f} + {backwards:.0f}" if backwards else f"{forwards:.0f}"


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"
