"""Traced paths as a figure: a line per path through its tokens, heads named where they move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ra_lens import load_demo_model, trace_paths
from ra_lens.figures import path_diagram
from ra_lens.paths import trace_layers
from refused import refused

PROMPT = "Q: France\nA: Paris\n\nQ: Italy\nA:"


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def test_across_layers_a_line_runs_from_the_target_down_to_the_embedding(model):
    trace = trace_layers(model, PROMPT, top_beam=3)
    figure = path_diagram(trace)
    assert [line.name[0] for line in figure.data] == ["3", "2", "1"]  # the best on top
    for line, beam in zip(reversed(figure.data), trace.beams, strict=True):
        assert list(line.y) == [4, 3, 2, 1, 0]
        assert [round(x) for x in line.x] == list(beam.positions)
        assert f"{beam.score_norm:.3g}".replace("-", "−") in line.name
    moved = [f"L{s.layer}H{s.head}" for beam in trace.beams for s in beam.steps if s.moves]
    assert sorted(note.text for note in figure.layout.annotations) == sorted(moved)
    places = [(round(note.x), round(note.y, 2)) for note in figure.layout.annotations]
    assert len(set(places)) == len(places)
    assert figure.layout.yaxis.ticktext[0] == "before layer 0"
    assert figure.layout.yaxis.ticktext[-1] == "after the last"
    assert len(figure.layout.xaxis.ticktext) == trace.seq_len


def test_only_some_layers_and_only_some_paths(model):
    trace = trace_layers(model, PROMPT, layers=[1, 3], top_beam=4)
    figure = path_diagram(trace, n_paths=2)
    assert [list(line.y) for line in figure.data] == [[2, 1, 0]] * 2
    assert list(figure.layout.yaxis.ticktext) == [
        "before layer 1", "before layer 3", "after the last"
    ]  # fmt: skip


def test_through_one_layer_rows_are_steps_back(model):
    trace = trace_paths(model, PROMPT, layer=0, top_beam=4, length_norm="avg_logprob")
    longest = max(len(beam.steps) for beam in trace.beams)
    figure = path_diagram(trace)
    for line, beam in zip(reversed(figure.data), trace.beams, strict=True):
        assert list(line.y) == [longest - i for i in range(len(beam.positions))]
    assert figure.layout.yaxis.ticktext[-1] == "target"
    assert figure.layout.yaxis.ticktext[-2] == "1 step back"
    assert not figure.layout.annotations


def test_what_cannot_be_drawn_is_refused(model):
    trace = trace_layers(model, PROMPT)
    refused(path_diagram, {"trace": trace, "n_paths": 0}, "found n_paths=0")
    refused(path_diagram, {"trace": replace(trace, beams=())}, "a trace without paths")
