"""Mistakes in what figures are asked for, each named."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pandas as pd
import pytest

from made_caches import make
from made_frames import areas, curves, sweep
from ra_lens.figures import (
    auc_table,
    head_grid,
    head_map,
    head_maps,
    patching_sweep_curve,
    perturbation_curves,
    query_key_pull,
    token_row,
)
from ra_lens.head_maps import head_of_example
from ra_lens.head_names import HeadScore
from ra_lens.report import write_report
from refused import refused, unchecked

MISTAKES = [
    # Maps and grids.
    (lambda ra: head_maps(ra, []), r"no heads .* ra\.top_heads"),
    (lambda ra: head_maps(ra, [(1, 0)]), r"layer=1, head=0.*layers \[0, 2\]"),
    (lambda ra: head_map(ra, HeadScore(0, 3, 1.0)), r"head=3.*heads 0 to 2"),
    (lambda ra: head_map(ra, (0, 0), example=2), "example=2.*examples 0 to 1"),
    (lambda ra: head_of_example(ra, (0, 0), example=-1), "example=-1"),
    (lambda ra: head_grid(ra, titles=["a", "b"]), "2 titles for 1 grids"),
    (lambda ra: head_grid(ra, kind=[]), "nothing to show"),
    (lambda ra: head_maps(ra, [(0, 0)], kinds=[]), "at least one kind"),
    (lambda ra: head_maps(ra, [(0, 0)], columns=0), "columns=0"),
    (lambda ra: unchecked(head_grid)(ra, order="size"), "order='size'; give 'index'"),
    (lambda ra: unchecked(head_maps)(ra, [(0, 0)], kinds=["grad"]), "kind='grad'"),
    (lambda ra: unchecked(head_maps)(ra, [(0, 0)], sign="up"), "sign='up'"),
    (lambda ra: unchecked(token_row)(ra, (0, 0), kind="grad"), "kind='grad'"),
    (lambda ra: unchecked(write_report)(ra, "r.html", sign="up"), "sign='up'"),
    # Rows of tokens.
    (lambda ra: token_row(ra, (0, 0), query=5), "query=5; the tokens shown are 0 to 4"),
    (lambda ra: token_row(ra, (0, 0), query=-6), "query=-6"),
    (lambda ra: query_key_pull(ra, (0, 0), k=0), "k=0"),
    # Tables of experiments.
    (
        lambda _: unchecked(perturbation_curves)(curves(), metric="top9"),
        "metric='top9'; give one of",
    ),
    (lambda _: unchecked(perturbation_curves)(curves(), facet="x"), "found facet='x'"),
    (lambda _: unchecked(patching_sweep_curve)(sweep(), metric="x"), "found metric='x'"),
    (lambda _: perturbation_curves(sweep()), "without 'method'.*perturbation_test"),
    (lambda _: patching_sweep_curve(curves()), "without 'map', 'scale'.*patching_sweep"),
    (lambda _: auc_table(curves()), "without 'auc'.*area_under_curve"),
    (lambda _: perturbation_curves(curves().iloc[:0]), "without rows"),
    (lambda _: perturbation_curves(curves().assign(top1=math.nan)), "in which 'top1' is empty"),
    (
        lambda _: perturbation_curves(curves().assign(share="x")),
        "the text 'x' for share in row 1",
    ),
    (
        lambda _: patching_sweep_curve(sweep().assign(scale=math.nan)),
        r"without a value for scale|'scale' is empty.*patching_sweep\(\)",
    ),
    (lambda _: patching_sweep_curve(sweep().assign(n_shots="5")), "the text '5' for n_shots"),
    (lambda _: patching_sweep_curve(sweep().assign(top1=math.nan)), "in which 'top1' is empty"),
    (lambda _: auc_table(areas().assign(auc="big")), "the text 'big' for auc in row 1"),
    (lambda _: auc_table(areas().assign(auc=math.nan)), "in which 'auc' is empty"),
    (lambda _: auc_table(areas().assign(task=None)), "in which 'task' is empty"),
    (
        lambda _: perturbation_curves(pd.concat([curves(), curves().assign(model="big")])),
        r"2 models \(tiny, big\).*frame\[frame.model == 'tiny'\]",
    ),
    (
        lambda _: patching_sweep_curve(pd.concat([sweep(), sweep().assign(n_test=9)])),
        "several rows for task=antonym, n_shots=0, map=none, scale=nan; they differ in n_test",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call: Any, message: str) -> None:
    refused(partial(call, make()), {}, message)
