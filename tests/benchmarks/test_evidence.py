"""What the benchmark of paths counts as reaching the evidence, on prompts small enough to check."""

from __future__ import annotations

import pytest

from benchmarks import evidence
from benchmarks.pointing import Asked
from ra_lens import load_demo_model, trace_paths
from ra_lens.model import as_lens
from ra_lens.paths import trace_layers
from real_model import needs_real_model, real_model
from tiny_models import KINDS

TEXT = "Q: France\nA: Paris\n\nQ: Italy\nA:"


def asked(country: str) -> Asked:
    target = as_lens(load_demo_model()).encode(" Rome", prepend_bos=False)[0]
    return Asked("countries", TEXT, target, country)


def test_a_path_reaches_the_tokens_that_it_visits() -> None:
    model = load_demo_model()
    trace = trace_layers(model, TEXT)  # whose best path is one step from “ Italy”, at 8
    assert trace.beams[0].tokens[-1] == " Italy"
    assert evidence.reached(trace, 1) == {8}
    assert evidence.reached(trace, 5) >= {8}
    assert 10 not in evidence.reached(trace, 5)  # where they begin
    assert evidence.reached(trace_paths(model, TEXT, target_pos=0), 5) == set()


def test_hits_are_those_of_the_paths_and_chance_is_that_of_so_many_tokens() -> None:
    model = load_demo_model()
    frame = evidence.measure(model, [(asked("Italy"), None), (asked("France"), "Italy")], None)
    by = frame[~frame.sinks & (frame.way == "value_norm") & (frame.paths == 1)]
    hits = {kind: own["hit"].tolist() for kind, own in by.groupby("kind")}
    assert hits == {"countries": [1.0, 0.0], "countries, either": [1.0]}
    chance = frame[frame.way == "chance"]
    # Nine tokens between the one in front and the last; one of them, or two, is evidence.
    assert chance["hit"].tolist() == pytest.approx(
        [1 / 9, 1 - (8 / 9) ** 3] * 2 + [2 / 9, 1 - (7 / 9) ** 3]
    )
    assert set(frame["way"]) == {*evidence.WAYS, "chance"}
    assert not frame[frame.way != "chance"]["found"].any()  # no sinks, so that both are the same
    one, other = (frame[frame.way.isin(evidence.WAYS) & (frame.sinks == s)] for s in (False, True))
    assert one["hit"].tolist() == other["hit"].tolist()


def test_what_is_printed_has_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_demo_model()
    evidence.print_evidence(evidence.measure(model, [(asked("Italy"), "France")], None))
    evidence.print_italy(model, None, n=3)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 * len(evidence.WAYS) + 1
    assert rows[0].startswith("| `value_norm` | 1.00 / 1.00 | 1.00 / 1.00 |")


@needs_real_model
def test_fifty_prompts_with_their_evidence() -> None:
    model = real_model(KINDS[-1])
    found = evidence.fifty(model)
    assert len(found) == 50
    for one, beside in found:
        assert one.evidence in one.text
        assert beside is None or (beside in one.text and beside != one.evidence)
    first, beside = found[0]
    assert first.text.startswith(f"I like {beside} and {first.evidence}.") or first.text.startswith(
        f"I like {first.evidence} and {beside}."
    )
