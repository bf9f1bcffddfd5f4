"""R does not depend on how the weights were processed; G does. And on precision, only a little."""

from __future__ import annotations

import pytest
import torch

from ra_lens import run_with_ra
from tiny_models import CASES, KINDS, N_LAYERS, random_ids, relative

IDS, TARGETS = random_ids(3, 6), [5, 11, 8]
# −log p of a target does not see constants added to all logits, as centring does.


def processed(model, kind):
    """The same model folded and centred."""
    if kind == "TransformerBridge":
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_()
    return model


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_ra_and_patterns_do_not_depend_on_folding_and_centring(arch, kind, shared, fresh):
    _, raw = run_with_ra(shared(arch, kind), IDS, target=TARGETS)
    _, ra = run_with_ra(processed(fresh(arch, kind), kind), IDS, target=TARGETS)
    for layer in range(N_LAYERS):
        assert relative(ra["ra", layer], raw["ra", layer]) < 1e-5
        assert relative(ra["pattern", layer], raw["pattern", layer]) < 1e-5
        # A folded value bias moves G by a constant in each row, which R takes away.
        moved = ra["pattern_grad", layer] - raw["pattern_grad", layer]
        inside = raw["pattern", layer] > 0
        spread = (moved - (moved * raw["pattern", layer]).sum(-1, keepdim=True))[inside]
        assert spread.norm() < 1e-4 * raw["pattern_grad", layer].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_the_pattern_does_depend_on_folded_value_biases(kind, shared, fresh):
    _, raw = run_with_ra(shared("gpt2", kind), IDS, target=TARGETS)
    _, ra = run_with_ra(processed(fresh("gpt2", kind), kind), IDS, target=TARGETS)
    assert relative(ra["pattern_grad", 0], raw["pattern_grad", 0]) > 1e-2


# Layers that are not collected run their own softmax backwards.
@pytest.mark.parametrize("layers", [None, [0]])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_fully_masked_rows_keep_to_themselves_in_processed_models(
    arch, kind, layers, shared, fresh
):
    texts = ["w5 w6 w7 w8 w9", "w10 w11"]
    options = {"target": [5, 11], "padding_side": "left", "prepend_bos": False, "layers": layers}
    _, raw = run_with_ra(shared(arch, kind), texts, **options)
    _, ra = run_with_ra(processed(fresh(arch, kind), kind), texts, **options)
    for layer in ra.layers:
        assert relative(ra["ra", layer], raw["ra", layer]) < 1e-5


@pytest.mark.every_model
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_half_precision_with_fully_masked_rows_gives_finite_float32(
    arch, kind, dtype, padding_side, fresh, shared
):
    texts = ["w5 w6 w7 w8 w9", "w10 w11"]
    options = {"target": [5, 11], "padding_side": padding_side, "prepend_bos": False}
    _, exact = run_with_ra(shared(arch, kind), texts, **options)
    model = fresh(arch, kind, dtype)
    for case in (model, processed(model, kind) if arch in ("gpt2", "llama") else None):
        if case is None:
            continue
        logits, ra = run_with_ra(case, texts, **options)
        assert bool(logits.isfinite().all())
        for layer in range(N_LAYERS):
            for name in ("ra", "pattern", "pattern_grad"):
                found = ra[name, layer]
                assert found.dtype == torch.float32
                assert bool(found.isfinite().all())
                padding = found[1, :, :3] if padding_side == "left" else found[1, :, 2:]
                assert not bool(padding.any())
            assert 0 < relative(ra["ra", layer], exact["ra", layer]) < 0.3
