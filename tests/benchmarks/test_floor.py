"""What is counted by hand is what torch multiplies, forwards and in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import engine, figures, models
from benchmarks.floor import Shape, floor, of_both_passes, of_forward, of_run, weights_read
from ra_lens import run_with_ra
from tiny_models import ANY_KIND, KINDS, relative

DOCS = Path(__file__).parents[2] / "docs"
NARROW = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
BATCH, TOKENS = 2, 11
REAL = {
    engine.GPT2: Shape(12, 12, 12, 64, 768, 3072, 50257, gated=False),
    engine.SMOLLM2: Shape(30, 9, 3, 64, 576, 1536, 49152, gated=True),
    engine.GEMMA3: Shape(18, 4, 1, 256, 640, 2048, 262144, gated=True),
}


def gpt2(kind):
    return models.gpt2_small(kind, n_layer=3, n_head=4, width=24, n_vocab=200)


def smollm2(kind):
    return models.smollm2(kind, n_layer=3, n_vocab=200, **NARROW)


def gemma3(kind):
    return models.gemma3(kind, n_layer=3, n_vocab=200, **NARROW, head_dim=8, sliding_window=8)


EVERY = pytest.mark.every_model
BRIDGE = pytest.mark.skipif("TransformerBridge" not in KINDS, reason="from TransformerLens 3 on")
CASES = [
    *[pytest.param(gpt2, kind, marks=EVERY if kind not in ANY_KIND else ()) for kind in KINDS],
    *[pytest.param(smollm2, kind, marks=EVERY) for kind in KINDS],
    pytest.param(gemma3, "TransformerBridge", marks=[EVERY, BRIDGE]),
]


def multiplied(run):
    """Multiplications of the products that a call makes; torch counts their additions as well."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


ALONE = [gpt2, pytest.param(smollm2, marks=EVERY), pytest.param(gemma3, marks=[EVERY, BRIDGE])]


@pytest.mark.parametrize("make", ALONE)
def test_what_hugging_face_multiplies_alone(make):
    model = make(models.HUGGING_FACE).requires_grad_(False)
    shape = models.shape_of(make(KINDS[-1]))
    ids = models.random_tokens(BATCH, TOKENS, n_vocab=199)
    found = multiplied(lambda: engine.both_passes(model, ids))
    # Transformers 4 makes the rotary angles by a product of positions and frequencies.
    angles = TOKENS * shape.d_head // 2
    assert found - of_both_passes(shape, batch=BATCH, n_tokens=TOKENS) in (0, angles)


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_are_those_of_the_model(kind):
    model, inside = gpt2(kind), gpt2(models.HUGGING_FACE)
    ids = models.random_tokens(BATCH, TOKENS, n_vocab=199)
    held = []

    def keep(grad, hook):
        held.append(grad.clone())

    with model.hooks(bwd_hooks=[("hook_embed", keep)]):
        (-model(ids)[:, -1].log_softmax(-1)[:, engine.TARGET].sum()).backward()
    assert relative(engine.both_passes(inside, ids), held[0]) < 1e-5


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_torch_multiplies_what_is_counted(make, kind):
    model = make(kind)
    ids = models.random_tokens(BATCH, TOKENS, n_vocab=199)
    shape = models.shape_of(model)
    run_with_ra(model, ids, target=5)  # learns how the model shows its patterns
    with torch.no_grad():
        found = multiplied(lambda: model(ids))
    assert found == of_forward(shape, batch=BATCH, n_tokens=TOKENS)
    options = {"batch": BATCH, "n_tokens": TOKENS}
    for store in ("maps", "norms"):
        found = multiplied(lambda store=store: run_with_ra(model, ids, target=5, store=store))
        assert found == of_run(shape, **options)
    answers = [[5, 6, 7]] * BATCH  # appended
    found = multiplied(lambda: run_with_ra(model, ids[:, :-3], target=answers))
    assert found == of_run(shape, **options, n_read=3)


def test_a_layer_of_round_numbers():
    # 2 layers, 1 head of 1, width 1, MLP 1, 10 words, one token: all products are of one entry.
    shape = Shape(2, 1, 1, 1, 1, 1, 10, gated=False)
    assert of_forward(shape, batch=1, n_tokens=1) == 2 * (3 + 1 + 2 + 2) + 10
    # Forwards the same; backwards the unembedding, two MLPs, two outputs, ∂L/∂A twice, and of the
    # second layer three projections, the values and both factors of the scores.
    assert of_run(shape, batch=1, n_tokens=1) == 26 + 10 + 2 * 2 + 2 + 2 + 3 + 3
    assert weights_read(shape) == (22 + 22 - 3) / 22


@EVERY
@pytest.mark.parametrize("name", REAL)
def test_shapes_are_those_of_the_models(name):
    kind = KINDS[-1]
    model = engine.load(name, kind, quick=True)
    if model is None:
        pytest.skip(f"{kind} does not load {name}")
    shape = vars(models.shape_of(model))
    small = {"n_layers": 2, "d_vocab": 1000}
    assert shape == {**vars(REAL[name]), **small}


def test_the_page_says_the_floors():
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    said = text.partition("## Where the time goes")[2].partition("## Where it ends")[0]
    said = " ".join(said.split())
    for name in (engine.GPT2, engine.SMOLLM2):
        shown = [f"{floor(REAL[name], batch=b, n_tokens=n):.2f}" for b, n in engine.SIZES[name]]
        assert f"{shown[0]} times (8 × 64) and {shown[1]} times (1 × 512)" in said
    few = floor(REAL[engine.SMOLLM2], batch=1, n_tokens=12)
    assert f"{few:.2f}" in said
    assert f"{weights_read(REAL[engine.SMOLLM2]):.2f}" in said


def test_what_is_kept_has_the_floors_of_its_shape():
    table = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))["engine"]
    assert table["columns"] == engine.COLUMNS
    for row in figures.records(table):
        size = tuple(map(int, row["batch × tokens"].split(" × ")))
        ratio = row["over the forward pass"]
        wanted = engine.counted(REAL[row["shape"]], row["route"], size, ratio)
        assert [row[name] for name in engine.COLUMNS[-3:]] == pytest.approx(wanted)
