"""The knockout test: cuts and slopes against own hooks and finite differences, and after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from left_behind import changes, snapshot
from ra_lens import load_demo_model, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.experiments import cuts, knockout_test, read_results
from ra_lens.experiments import knockout as knockout_module
from ra_lens.experiments.cuts import gauss_points
from ra_lens.experiments.journal import journal_path
from ra_lens.model import Sites, as_lens, blocks
from ra_lens.tasks import Pair, Task, load_task
from refused import refused
from tiny_models import KINDS, every_model, load, write_folder
from toys import knowing_task

QUIET = {"progress": False}
SLOPES = {"steps": (1, 2), "ends": True, "steps_of": "all"}


@pytest.fixture(scope="module")
def demo():
    return load_demo_model(device="cpu")


# Hugging Face's Llama, which a bridge runs, has norms in float32 whatever the rest is in.
CASES = [
    ("gpt2", KINDS[0]),
    *every_model(
        *(("llama", kind) for kind in KINDS if kind == "HookedTransformer"),
        *(("gpt2", kind) for kind in KINDS[1:]),
    ),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exact(request, tmp_path_factory):
    """A tiny model in float64."""
    arch, kind = request.param
    folder = write_folder(arch, tmp_path_factory.mktemp(arch))
    return load(folder, kind, torch.float64)


@pytest.fixture(scope="module")
def tested(exact):
    """Edges and sets of three questions of it, cut in both ways, with everything foretold."""
    return knockout_test(
        exact, knowing_task(), n_edges=2, n_sets=1, n_test=3, shots=2,
        cuts=("renormalised", "plain"), **SLOPES, **QUIET,
    )  # fmt: skip


# ---- one forward pass at a time, with hooks of one's own ----------------------------------------


def asked(model: Any, row: Any) -> tuple[torch.Tensor, int]:
    """Token ids of the question of a row, and the first token of its answer."""
    return question(model, row.task, row.n_shots, row.n_test, row.seed, row.question)


@lru_cache(maxsize=1)  # a row asks it dozens of times
def question(
    model: Any, name: str, n_shots: int, n_test: int, seed: int, number: int
) -> tuple[torch.Tensor, int]:
    lens = as_lens(model)
    task = {"three-on": knowing_task}.get(name, lambda: load_task(name))()
    prompt = task.split("code").prompts("test", shots=n_shots, n=n_test, seed=seed)[number]
    ids = lens.encode(prompt.text, prepend_bos=None)
    return torch.tensor([ids]), lens.encode(prompt.text + prompt.answer, prepend_bos=None)[len(ids)]


@lru_cache(maxsize=1)
def sites_of(model: Any) -> Sites:
    return as_lens(model).sites


def loss(model: Any, row: Any, hooks: list[Any]) -> float:
    ids, answer = asked(model, row)
    with torch.no_grad():
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)
    return -float(logits[0, -1].double().log_softmax(dim=-1)[answer])


def edges(model: Any, row: Any) -> dict[int, list[tuple[int, list[int]]]]:
    """Layers of a row with its heads, and the keys."""
    sites = sites_of(model)
    layers = [layer for layer in sites if row.layer <= layer < row.layer + row.window]
    keys = [int(key) for key in row["keys"].split()]
    heads = {layer: range(sites[layer].n_heads) if row["head"] < 0 else [row["head"]]
             for layer in layers}  # fmt: skip
    return {layer: [(head, keys) for head in some] for layer, some in heads.items()}


def at_patterns(model: Any, row: Any, change: Callable[[torch.Tensor, list[int]], torch.Tensor]):
    """Hooks that put `change(row of A, keys)` into the place of each row that is cut."""
    sites = sites_of(model)

    def hooked(some: list[tuple[int, list[int]]]) -> Any:
        def hook(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
            pattern = pattern.clone()
            for head, keys in some:
                pattern[0, head, row.query] = change(pattern[0, head, row.query], keys)
            return pattern

        return hook

    return [(sites[layer].pattern_name, hooked(some)) for layer, some in edges(model, row).items()]


def cut_by(share: float, *, renormalise: bool) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    def change(weights: torch.Tensor, keys: list[int]) -> torch.Tensor:
        after = weights.clone()
        after[keys] = 0
        after = after / after.sum() if renormalise else after
        return weights + share * (after - weights)

    return change


def weakened_by(share: float) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    def change(weights: torch.Tensor, keys: list[int]) -> torch.Tensor:
        factors = torch.ones_like(weights)
        factors[keys] = 1 - share
        return weights * factors / (weights * factors).sum()

    return change


def slope(of: Callable[[float], float], at: float = 0.0, step: float = 1e-4) -> float:
    return (of(at + step) - of(at - step)) / (2 * step)


def test_what_is_measured_is_a_forward_pass_with_scores_of_minus_infinity(demo):
    frame = knockout_test(
        demo, ["antonym", "country-capital"], n_edges=2, n_sets=2, n_test=2, seed=3, **QUIET
    )
    sites = as_lens(demo).sites
    assert {1, 3} == set(frame.window)
    assert frame.measured.abs().max() > 0.02
    for _, row in frame.iloc[::2].iterrows():

        def masked(some: Any, query: int = row["query"]) -> Any:
            def hook(scores: torch.Tensor, hook: Any) -> torch.Tensor:
                for head, keys in some:
                    scores[0, head, query, keys] = -torch.inf
                return scores

            return hook

        hooks = [(sites[layer].scores_name, masked(s)) for layer, s in edges(demo, row).items()]
        before = loss(demo, row, [])
        assert row.loss == pytest.approx(before, abs=2e-5)
        assert row.measured == pytest.approx(loss(demo, row, hooks) - before, abs=3e-5)


def test_cuts_and_slopes_are_those_of_finite_differences(exact, tested):
    assert set(tested.what) == {"edge", "set"}
    assert set(tested.window) == {1, 3}
    for _, row in tested.iloc[::3].iterrows():
        renormalise = row.cut == "renormalised"

        def made(share: float, row: Any = row, renormalise: bool = renormalise) -> float:
            change = cut_by(share, renormalise=renormalise)
            return loss(exact, row, at_patterns(exact, row, change))

        assert row.measured == pytest.approx(made(1.0) - made(0.0), abs=1e-10)
        start, middle, end = (slope(made, at) for at in (0.0, 0.5, 1.0))
        assert row.predicted == pytest.approx(start, abs=1e-7, rel=1e-5)
        assert row.gauss_1 == pytest.approx(middle, abs=1e-7, rel=1e-5)
        assert row.end == pytest.approx(end, abs=1e-7, rel=1e-5)
        assert row.trapezoid == pytest.approx((start + end) / 2, abs=1e-7, rel=1e-5)
        two = [slope(made, 0.5 + sign / 12**0.5) for sign in (-1, 1)]
        assert row.gauss_2 == pytest.approx(sum(two) / 2, abs=1e-7, rel=1e-5)


def test_rivals_are_those_of_finite_differences(exact, tested):
    lens = as_lens(exact)
    name = lens.block_input_name(next(iter(lens.sites.values())))
    for _, row in tested.iloc[::7].iterrows():

        def plain(share: float, row: Any = row) -> float:
            change = cut_by(share, renormalise=False)
            return loss(exact, row, at_patterns(exact, row, change))

        keys = [int(key) for key in row["keys"].split()]

        def weakened(share: float, row: Any = row) -> float:
            return loss(exact, row, at_patterns(exact, row, weakened_by(share)))

        def less_input(share: float, row: Any = row, keys: list[int] = keys) -> float:
            def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
                x = x.clone()
                x[0, keys] *= 1 - share
                return x

            return loss(exact, row, [(name, hook)])

        assert row.a_grad == pytest.approx(slope(plain), abs=1e-7, rel=1e-5)
        assert row.minus_ra == pytest.approx(slope(weakened), abs=1e-7, rel=1e-5)
        assert row.input_grad == pytest.approx(slope(less_input), abs=1e-7, rel=1e-5)
        attention, largest, values = 0.0, 0.0, 0.0
        ids, _ = asked(exact, row)
        with torch.no_grad():
            _, cache = exact.run_with_cache(ids)
        for layer, some in edges(exact, row).items():
            site = lens.sites[layer]
            attn = exact.blocks[layer].attn
            for head, _ in some:
                pattern = cache[site.pattern_name][0, head, row["query"]]
                group = head * site.n_key_value_heads // site.n_heads
                v = cache[site.value_name].reshape(1, ids.shape[1], site.n_key_value_heads, -1)[
                    0, :, group
                ]
                for key in keys:

                    def more(share: float, row: Any = row, at: Any = (layer, head, key)) -> float:
                        def hook(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
                            pattern = pattern.clone()
                            pattern[0, at[1], row["query"], at[2]] += share
                            return pattern

                        return loss(exact, row, [(lens.sites[at[0]].pattern_name, hook)])

                    attention += float(pattern[key])
                    largest += abs(slope(more))
                    values += float(pattern[key] * (v[key] @ attn.W_O[head].detach()).norm())
        assert row.pattern == pytest.approx(attention)
        assert row.grad == pytest.approx(largest, rel=1e-5)
        assert row.value == pytest.approx(values, rel=1e-5)


def test_of_a_plain_cut_the_forecast_is_a_times_g(tested):
    plain = tested[tested.cut == "plain"]
    np.testing.assert_allclose(plain.predicted, plain.a_grad, atol=1e-12)
    # Both ways of cutting are of the same edges, which other columns show.
    columns = ["question", "layer", "head", "query", "keys", "a_grad", "minus_ra", "pattern"]
    other = tested[tested.cut == "renormalised"]
    pd.testing.assert_frame_equal(
        plain[columns].reset_index(drop=True), other[columns].reset_index(drop=True)
    )


def test_gauss_points_integrate_polynomials_exactly():
    for n in (1, 2, 3, 5):
        points = gauss_points(n)
        for power in range(2 * n):
            assert sum(w * t**power for t, w in points) == pytest.approx(1 / (power + 1))


# ---- what is drawn ------------------------------------------------------------------------------


def test_edges_drawn_are_the_strongest_and_seen_ones(demo):
    frame = knockout_test(demo, "antonym", n_edges=5, n_sets=0, n_test=4, **QUIET)
    counts = frame.groupby(["question", "layer", "drawn"]).size().unstack()
    assert (counts["strongest"] == 2).all()
    assert counts["random"].max() == 3
    assert len(frame) == len(frame[["question", "layer", "head", "query", "key"]].drop_duplicates())
    at_random = frame[frame.drawn == "random"]
    assert (at_random.pattern > 0.02).all()
    assert (at_random.minus_ra != 0).any()
    assert (frame["key"] <= frame["query"]).all()
    assert (frame["first"] == (frame["key"] == 0)).all()
    assert not ((frame["query"] == 0) & (frame.drawn == "random")).any()  # it holds nothing else
    # The largest |R| of a layer, by a run of one's own.
    row = frame[(frame.drawn == "strongest") & (frame.layer == 1)].iloc[0]
    ids, answer = asked(demo, row)
    _, ra = run_with_ra(demo, ids, target=[answer], progress=False)
    best = int(ra["ra", 1][0].abs().argmax())
    n = ids.shape[1]
    assert (row["head"], row["query"], row["key"]) == (best // n**2, best // n % n, best % n)
    others = knockout_test(demo, "antonym", n_edges=5, n_sets=0, n_test=4, seed=1, **QUIET)
    assert list(others["keys"]) != list(frame["keys"])


def test_the_same_span_is_cut_with_and_without_the_first_token_in_every_width(demo):
    frame = knockout_test(
        demo, "capitalize", n_edges=0, n_sets=3, n_test=4, windows=(1, 2), **QUIET
    )
    assert len(frame) == 4 * 3 * 2 * 3
    for (_, _), part in frame.groupby(["question", frame.index // 3]):
        span, both, first = (list(map(int, keys.split())) for keys in part["keys"])
        assert list(part.drawn) == ["span", "span and first", "first"]
        assert first == [0]
        assert both == [0, *span]
        assert span == list(range(span[0], span[-1] + 1))
        assert 1 <= span[0] <= span[-1] < part["query"].iloc[0]
        assert len(span) <= 4
        assert part["first"].tolist() == [False, True, True]
    assert (frame["head"] == -1).all()
    assert (frame.layer + frame.window <= len(as_lens(demo).sites)).all()
    assert len(set(frame["keys"])) > 6


# ---- batches, and where the forward pass begins -------------------------------------------------


def test_batches_change_nothing(exact):
    # Questions of 3 to 5 words run padded together, or one by one.
    pairs = [
        Pair(" ".join(f"w{3 + (7 * i + k) % 30}" for k in range(3 + i % 3)), f"w{4 + i}")
        for i in range(20)
    ]
    task = Task("lengths", "icl", tuple(pairs), "", "", separator=" ")
    options = {
        "n_edges": 2,
        "n_sets": 1,
        "n_test": 3,
        "shots": (0, 1),
        "windows": 2,
        **SLOPES,
        **QUIET,
    }
    frame = knockout_test(exact, task, **options)
    alone = knockout_test(exact, task, batch_size=1, **options)
    assert frame[frame.what == "set"].groupby("n_shots")["query"].nunique().min() > 1
    columns = ["loss", "measured", "predicted", "input_grad", "value", "end", "gauss_2"]
    np.testing.assert_allclose(frame[columns], alone[columns], atol=1e-10)
    assert list(frame["keys"]) == list(alone["keys"])


@pytest.mark.parametrize("wrong", ["values", "raises"])
def test_a_model_whose_blocks_cannot_be_skipped_runs_in_full(demo, monkeypatch, wrong):
    options = {"n_edges": 2, "n_sets": 1, "n_test": 2, "steps": 1, **QUIET}
    wanted = knockout_test(demo, "antonym", **options)
    begun: list[int] = []
    reused = blocks.SkippedBlocks.reused

    @contextmanager
    def spoilt(self: Any, layer: int, examples: torch.Tensor):
        begun.append(layer)
        if wrong == "raises":
            raise RuntimeError
        kept = dict(self._returned)
        self._returned = {block: kept[block] * 1.5 for block in kept}
        try:
            with reused(self, layer, examples):
                yield
        finally:
            self._returned = kept

    monkeypatch.setattr(blocks.SkippedBlocks, "reused", spoilt)
    found = knockout_test(demo, "antonym", **options)
    np.testing.assert_allclose(found.measured, wanted.measured, atol=1e-4)
    np.testing.assert_allclose(found.gauss_1, wanted.gauss_1, atol=1e-4, equal_nan=True)
    later = [layer for layer in begun if layer > 0 or wrong == "raises"]
    assert sorted(set(later)) == sorted(later), "a layer was tried again after it had failed"


def test_blocks_before_a_cut_are_skipped(demo, monkeypatch):
    ran: list[tuple[int, int]] = []
    own = cuts.CutQuestions.losses

    def counted(self: Any, some: Any) -> torch.Tensor:
        first = as_lens(demo).sites[0]
        batch_sizes: list[int] = []

        def look(pattern: torch.Tensor) -> None:
            batch_sizes.append(len(pattern))

        with as_lens(demo).looking({first.pattern_name: look}):
            found = own(self, some)
        ran.append((some[0].layer, sum(batch_sizes)))
        return found

    monkeypatch.setattr(cuts.CutQuestions, "losses", counted)
    knockout_test(demo, "antonym", n_edges=4, n_sets=0, n_test=5, **QUIET)
    n_layers = len(as_lens(demo).sites)
    assert [layer for layer, _ in ran] == list(range(n_layers))
    # The questions as they are and the proof of each layer run in full, before layer 0 is cut;
    # of what is cut later the first block sees nothing.
    assert [n for _, n in ran[1:]] == [0] * (n_layers - 1)


def test_nothing_is_left_on_the_model(demo):
    demo.zero_grad()
    before = snapshot(demo)
    knockout_test(demo, "antonym", n_edges=1, n_sets=1, n_test=2, **SLOPES, **QUIET)
    assert not changes(before, snapshot(demo))


# ---- killed, and refused ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", *every_model("csv")])
@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_stopped_gives_the_identical_result(
    demo, tmp_path, monkeypatch, ending, after
):
    options = {"n_edges": 1, "n_sets": 1, "n_test": 2, "windows": 1, "steps": 1, **QUIET}
    out = tmp_path / f"stopped.{ending}"
    own, calls = knockout_module._foretell, itertools.count()
    measure = knockout_module._Measuring.measure

    def stopping(function: Any) -> Any:
        def call(*args: Any) -> Any:
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(knockout_module, "_foretell", stopping(own))
        patch.setattr(knockout_module._Measuring, "measure", stopping(measure))
        with pytest.raises(KeyboardInterrupt):
            knockout_test(demo, ["antonym", "capitalize"], out=out, **options)
    assert not out.exists()
    assert journal_path(out).read_bytes().count(b"\n") == 1 + after
    done: list[int] = []
    monkeypatch.setattr(
        knockout_module, "_foretell", lambda cell, i: done.append(i) or own(cell, i)
    )
    resumed = knockout_test(demo, ["antonym", "capitalize"], out=out, **options)
    assert len(done) == 4 - min(after, 2), "what is foretold already was foretold again"
    whole = knockout_test(demo, ["antonym", "capitalize"], out=tmp_path / f"w.{ending}", **options)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert out.read_bytes() == (tmp_path / f"w.{ending}").read_bytes()
    again = knockout_test(demo, ["antonym", "capitalize"], out=out, **options)
    pd.testing.assert_frame_equal(again, read_results(out), check_exact=True)
    with pytest.raises(BadInput, match=r"run with other settings \(n_sets: there 1, here 2"):
        knockout_test(demo, ["antonym", "capitalize"], out=out, **{**options, "n_sets": 2})


def test_wrong_options_are_refused_before_anything_runs(demo, monkeypatch):
    monkeypatch.setattr(knockout_module, "_foretell", lambda *_: pytest.fail("it ran"))
    for options, message in [
        ({"n_edges": 0, "n_sets": 0}, "found n_edges=0 and n_sets=0, which cut nothing"),
        ({"windows": (1, 9)}, r"found windows=\[1, 9\]; give different numbers of layers, of 1 to"),
        ({"windows": (1, 1)}, r"found windows=\[1, 1\]; give different numbers"),
        ({"cuts": ("plain", "plain")}, "found cuts="),
        ({"steps": 0}, "steps"),
        ({"n_test": 0}, "n_test"),
    ]:
        given = {"model": demo, "task": "antonym", **QUIET, **options}
        refused(knockout_test, given, message)
    half = load_demo_model(device="cpu").to(torch.float16)
    with pytest.raises(UnsupportedModel, match="float16"):
        knockout_module.refuse_slopes(as_lens(half))
