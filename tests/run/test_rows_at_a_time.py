"""`batch_size="auto"` where rankings and experiments cut their own batches; what advice names."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import ra_lens.fitting
import ra_lens.memory
from ra_lens import best_scale, rank_heads, run_with_ra
from ra_lens.errors import BadInput, NotEnoughMemory
from ra_lens.experiments.cuts import Cut, CutQuestions
from ra_lens.fitting import rows_of_forward, rows_of_run
from ra_lens.heads import head_effects, one_run_method, registry
from ra_lens.knockouts.edges import Box, EdgeSet, Positions
from ra_lens.model import as_lens
from ra_lens.padding import batches
from ra_lens.patching.masking import read_z
from ra_lens.paths import read_maps, trace_layers
from ra_lens.prompts import read_prompts
from ra_lens.questions import Questions, ask
from ra_lens.tasks import Prompt
from tiny_models import (
    ANY_KIND,
    D_MODEL,
    D_VOCAB,
    KINDS,
    N_HEADS,
    N_LAYERS,
    random_ids,
    text,
)

# Of one row of seven tokens, in bytes: a map, a layer's activations, the width of the model at all
# layers, the logits at one position.
MAP = 4 * N_HEADS * 7 * 7
LAYER = MAP + 4 * 7 * (5 + 4) * D_MODEL
WIDTH = 4 * N_LAYERS * 7 * D_MODEL
LOGITS = 4 * D_VOCAB
FORWARD = 5 * (LAYER + 3 * LOGITS)
NORMS = LOGITS + 2 * (N_LAYERS * LAYER + 3 * LOGITS)
IDS = random_ids(6, 7)


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""

    def say(n_bytes):
        for module in (ra_lens.memory, ra_lens.fitting):
            monkeypatch.setattr(module, "free_memory", lambda device: n_bytes)

    return say


def read_of(model, ids=IDS):
    return read_prompts(as_lens(model), ids)


# ---- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    ("count", "options", "of_row", "held"),
    [
        (rows_of_forward, {}, FORWARD, 0),
        (rows_of_forward, {"n_read": 2}, FORWARD + 5 * 3 * LOGITS, 0),
        (rows_of_forward, {"kept": 2}, FORWARD + 2 * WIDTH, 0),
        (rows_of_forward, {"kept": 1, "of_all": True}, FORWARD + WIDTH, 6 * WIDTH),
        (rows_of_forward, {"added": 2}, FORWARD + 5 * 2 * MAP, 0),
        (rows_of_run, {}, NORMS, 0),
        (rows_of_run, {"n_read": 3}, NORMS + 2 * (LOGITS + 2 * 3 * LOGITS), 0),
        (rows_of_run, {"wanted": lambda name: name.endswith("_ra")}, NORMS + N_LAYERS * MAP, 0),
        (rows_of_run, {"vectors": frozenset(["z", "z_grad"])}, NORMS + 2 * WIDTH, 0),
    ],
)
def test_rows_are_counted(count, options, of_row, held, kind, shared, free):
    model = shared("gpt2", kind)
    lens, prompts = as_lens(model), read_of(model)
    for fitting in (2, 5, 1000):
        free(held + fitting * of_row)
        assert count(lens, prompts, **options) == fitting
        free(held + fitting * of_row - 1)
        assert count(lens, prompts, **options) == fitting - 1
    free(1)
    assert count(lens, prompts, **options) == 1
    free(None)  # it does not say
    assert count(lens, prompts, **options) == 64


def test_the_longest_prompt_counts(shared, free):
    model = shared("gpt2", KINDS[0])
    lens = as_lens(model)
    free(10 * FORWARD)
    ragged = [[1, 2, 3], IDS[0].tolist(), [4, 5]]
    assert rows_of_forward(lens, read_prompts(lens, ragged)) == 10


def peak(run):
    """The most bytes that are allocated at a time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.every_model
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pos", "n"), [(12, 48), (300, 4)])
def test_what_is_counted_is_needed_and_what_is_allowed_is_enough(pos, n, kind, shared, free):
    sizes = {"n_positions": 320, "n_embd": 120, "n_head": 5}
    model = shared("gpt2", kind, **sizes)
    lens, ids = as_lens(model), random_ids(n, pos)
    prompts = read_prompts(lens, ids)
    layer = 4 * (5 * pos * pos + pos * 9 * 120)
    forward = 5 * (layer + 3 * LOGITS)
    asked = Questions(prompts, ((8,),) * n)
    _, ra = run_with_ra(model, ids[:1], target=8)
    scales = [-float(scale) for scale in range(1, n)]
    for run, counted, allowed in (
        (partial(ask, lens, asked, batch_size="auto"), layer, forward),
        (
            partial(best_scale, model, ra.mean(), ids[:1], 8, scales=scales, progress=False),
            layer + 4 * 2 * 5 * pos * pos,
            forward + 4 * 5 * 2 * 5 * pos * pos,
        ),
    ):
        free(n * allowed)
        auto = partial(run, batch_size="auto")
        auto()  # what is looked at once
        assert n * counted < peak(auto) < n * allowed


# ---- who takes it -------------------------------------------------------------------------------


@pytest.fixture
def model(shared, request):
    return shared("gpt2", KINDS[0])


@pytest.fixture
def sizes(model):
    """Rows of each forward pass of a model."""
    found: list[int] = []

    def note(x, hook):
        found.append(len(x))

    with model.hooks(fwd_hooks=[("hook_embed", note)]):
        yield found


def asked_of(model):
    return Questions(read_of(model), ((8,),) * 6)


def cuts_of(model):
    box = Box({1: (2,)}, Positions((6,)), Positions((1,)))
    return [Cut(question, 1, EdgeSet(((box,),))) for question in range(6)]


def cut(model, *, batch_size):
    return CutQuestions(as_lens(model), asked_of(model), batch_size=batch_size).losses(
        cuts_of(model)
    )


def sloped(model, *, batch_size):
    """Slopes, of which batches with a backward pass are the last."""
    questions = CutQuestions(as_lens(model), asked_of(model), batch_size=batch_size)
    return questions.slopes(cuts_of(model), 0.5)


def scaled(model, *, batch_size):
    _, ra = run_with_ra(model, IDS[:1], target=8)
    scales = [-1, -2, -3, -4, -5]
    options = {"scales": scales, "batch_size": batch_size, "progress": False}
    return best_scale(model, ra.mean(), IDS[:1], 8, **options).losses


def looked(model, *, batch_size):
    lens = as_lens(model)
    parts = [part for part, _ in batches(lens, read_of(model), batch_size)]
    for part in parts:
        model(IDS[part])
    return torch.tensor([i for part in parts for i in part])


TAKERS = {
    "ask": (
        lambda model, **how: ask(as_lens(model), asked_of(model), **how).logit_diff,
        FORWARD,
        0,
    ),
    "batches": (looked, FORWARD, 0),
    "read_z": (
        lambda model, **how: read_z(as_lens(model), read_of(model), **how)[1],
        FORWARD + WIDTH,
        6 * WIDTH,
    ),
    "read_maps": (
        lambda model, **how: torch.stack(
            [torch.tensor(maps.layers[1].maps) for maps in read_maps(model, IDS, **how)]
        ),
        FORWARD,
        0,
    ),
    "best_scale": (scaled, FORWARD + 5 * 2 * MAP, 0),
    "cuts": (cut, FORWARD + WIDTH, 0),
    "slopes": (sloped, NORMS, 0),
}


@pytest.mark.parametrize("name", TAKERS)
def test_auto_takes_as_many_rows_as_fit(name, model, sizes, free):
    run, of_row, held = TAKERS[name]
    wanted = run(model, batch_size=6)
    for fitting in (3, 2):
        free(held + fitting * of_row)
        sizes.clear()
        found = run(model, batch_size="auto")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (sizes[-1] if name == "slopes" else max(sizes)) == fitting


@pytest.fixture
def prompts(model):
    """Prompts of seven tokens with answers of one."""
    lens = as_lens(model)
    found = [Prompt(text(ids), text(ids[:1])) for ids in random_ids(4, 6).tolist()]
    assert [len(lens.encode(one.text, prepend_bos=None)) for one in found] == [7] * 4
    return found


@pytest.mark.parametrize(
    ("method", "of_row"),
    [
        # The answer behind the prompt is an eighth token.
        ("ra", lambda of_8: LOGITS + 2 * (N_LAYERS * of_8["layer"] + 3 * LOGITS)),
        ("atp", lambda of_8: (
            LOGITS + 2 * (N_LAYERS * of_8["layer"] + 3 * LOGITS) + 2 * of_8["width"]
        )),
        ("grad_sam", lambda of_8: (
            LOGITS + 2 * (N_LAYERS * of_8["layer"] + 3 * LOGITS) + 2 * N_LAYERS * of_8["map"]
        )),
    ],
)  # fmt: skip
def test_methods_of_one_run_count_what_they_keep(method, of_row, model, prompts, sizes, free):
    wanted = rank_heads(model, prompts, method=method, progress=False)
    map_of_8 = 4 * N_HEADS * 8 * 8
    of_8 = {"map": map_of_8, "layer": map_of_8 + 4 * 8 * 9 * D_MODEL, "width": WIDTH * 8 // 7}
    free(3 * of_row(of_8))
    sizes.clear()
    found = rank_heads(model, prompts, method=method, batch_size="auto", progress=False)
    assert sizes == [3, 1]
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-6)
    free(3 * of_row(of_8) - 1)
    sizes.clear()
    rank_heads(model, prompts, method=method, batch_size="auto", progress=False)
    assert sizes == [2, 2]


def test_heads_changed_one_by_one_run_as_fits(model, prompts, sizes, free):
    rank = partial(rank_heads, model, prompts, methods=["cm1", "fa"], progress=False)
    wanted, effects = rank(), head_effects(model, prompts, progress=False)
    for fitting in (3, 2):
        free(fitting * (FORWARD + WIDTH))
        for run in (
            lambda: rank(batch_size="auto")["cm1"].scores - wanted["cm1"].scores,
            lambda: rank(batch_size="auto")["fa"].scores - wanted["fa"].scores,
            lambda: (
                head_effects(model, prompts, batch_size="auto", progress=False).effects
                - effects.effects
            ),
        ):
            sizes.clear()
            assert run().abs().max() < 1e-4
            assert max(sizes) == fitting


def test_a_method_of_the_users_gets_a_number(model, prompts, free, monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    seen: list[int] = []

    @registry.ranking_method("mine")
    def scores(context):
        seen.append(context.batch_size)
        return torch.zeros(context.shape)

    free(7 * (FORWARD + WIDTH))
    rank_heads(model, prompts, method="mine", batch_size="auto")
    rank_heads(model, prompts, method="mine", batch_size=3)
    assert seen == [7, 3]


@pytest.mark.parametrize("wrong", ["half", 1.5])
def test_what_is_no_batch_size_is_refused(wrong, model, prompts, request):
    if request.config.getoption("--check-shapes"):
        pytest.skip("the annotation says so first")
    with pytest.raises(BadInput, match=r"batch_size=.*; give a whole number from 1 on, or 'auto'"):
        rank_heads(model, prompts, batch_size=wrong)
    with pytest.raises(BadInput, match="batch_size=0; give at least 1"):
        head_effects(model, prompts, batch_size=0)


# ---- advice -------------------------------------------------------------------------------------


def advice(run):
    with pytest.raises(NotEnoughMemory) as refused:
        run()
    return str(refused.value).rpartition("free on cpu. ")[2]


def test_advice_names_what_the_function_called_has(model, prompts, free, monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @one_run_method("of_maps", maps=["ra", "pattern"])
    def of_maps(ra):
        return ra.norms()

    rank = partial(rank_heads, model, prompts, method="of_maps", progress=False)
    map_of_8 = 4 * N_HEADS * 8 * 8
    graph = N_LAYERS * (map_of_8 + 4 * 8 * 9 * D_MODEL)
    free(graph)
    # All maps of one prompt fit, and all that run_with_ra would suggest is not there.
    assert advice(rank) == f"Use batch_size=1 ({graph / 1e6:.1f} MB)."
    rank(batch_size=1)
    free(graph - 1)
    wanted = "Nothing that can be chosen here makes it fit: shorten the prompts."
    assert advice(rank) == wanted
    assert advice(partial(rank, batch_size="auto")) == wanted
    assert "Use batch_size=1" in advice(partial(run_with_ra, model, IDS, target=8, store="norms"))


def test_advice_to_paths_names_layers(model, free):
    layer = LAYER + 3 * MAP
    free(layer)
    read = partial(read_maps, model, IDS[:1], follow="more", target=8)
    assert advice(read).startswith(f"Use layers=[{N_LAYERS - 1}] (")
    assert advice(read).endswith("MB); layers= collects fewer layers.")
    read(layers=[N_LAYERS - 1])
    trace = partial(trace_layers, model, IDS[:1], follow="more", target=8)
    assert advice(trace) == advice(read)
    several = advice(partial(read_maps, model, IDS, follow="more", target=8))
    assert several.startswith("Nothing that can be chosen")


def test_who_calls_whom_has_what_both_have(model, free):
    free(GRAPH := N_LAYERS * LAYER)
    run = partial(run_with_ra, model, IDS, target=8, store="norms")
    with ra_lens.memory.offering("layers"), ra_lens.memory.offering("batch_size", "layers"):
        assert "batch_size" not in advice(run)
    with ra_lens.memory.offering("batch_size", typed=True):
        assert advice(run) == f"Use --batch-size 1 ({GRAPH / 1e6:.1f} MB)."
        with ra_lens.memory.offering("batch_size", "layers"):
            assert advice(run).startswith("Use --batch-size 1 (")
    assert "recompute=True" in advice(run)
