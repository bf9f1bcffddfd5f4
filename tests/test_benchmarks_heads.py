"""What the benchmarks of head ranking compare does the same thing; how fast is not tested."""

from __future__ import annotations

import json

from benchmarks import mediation, perturbation


def checked(table):
    assert set(table) == {"title", "how", "columns", "rows"}
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return json.loads(json.dumps(table))["rows"]


def test_causal_mediation_has_the_same_effects_either_way():
    for *_, apart, largest in checked(mediation.measure(rounds=1, quick=True)):
        assert largest > 0
        assert apart < 1e-4


def test_the_perturbation_test_has_the_same_logit_differences_either_way():
    rows = checked(perturbation.measure(rounds=1, quick=True))
    assert len(rows) == 2
    assert all(apart < 1e-4 for *_, apart in rows)
