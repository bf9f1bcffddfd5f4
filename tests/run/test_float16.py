"""Models in float16: gradients stay in its range, whatever the size of the loss."""

from __future__ import annotations

import pytest
import torch

from ra_lens import load_demo_model, run_with_ra
from ra_lens.errors import NothingToDifferentiate
from tiny_models import CASES, EDITABLE, KINDS, N_LAYERS, every_model, random_ids, relative

POS, TARGETS = 7, [5, 11]
IDS = random_ids(2, POS)
HALF = torch.float16


def times(factor):
    """−log p of the targets, times a factor."""

    def metric(logits):
        wide = logits[:, -1].double() if logits.dtype == torch.float64 else logits[:, -1].float()
        return -factor * wide.log_softmax(-1).gather(1, torch.tensor(TARGETS)[:, None])[:, 0]

    return metric


@pytest.mark.parametrize(
    "options", [{}, *every_model({"recompute": True}, {"store": "norms"})], ids=str
)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_loss_of_any_size_gives_maps_of_that_size(arch, kind, options, shared):
    """A backward pass is linear: the loss times a power of two gives the maps times it, exactly."""
    model = shared(arch, kind, HALF)
    run_with_ra(model, IDS, target=TARGETS)
    _, plain = run_with_ra(model, IDS, metric=times(1.0), **options)
    for exponent in (-20, -13, 13):
        _, ra = run_with_ra(model, IDS, metric=times(2.0**exponent), **options)
        for name, value in plain.items():
            factor = 1.0 if name.endswith("pattern") else 2.0**exponent
            assert torch.equal(ra[name], factor * value)
        assert torch.equal(ra.norms(), 2.0**exponent * plain.norms())
        assert float(ra.norms().min()) > 0


@pytest.mark.every_model
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_are_close_to_those_of_the_same_weights_in_float64(arch, kind, fresh, shared):
    model = fresh(arch, kind, HALF)
    exact = shared(arch, kind, torch.float64)
    small = 1e-5  # gradients of 1e-6 further down, where float16 has two bits or three
    _, wanted = run_with_ra(exact, IDS, metric=times(small))
    for _ in range(2):  # before and after the route is known
        _, ra = run_with_ra(model, IDS, metric=times(small))
        # The forward pass is in float16 as well; that of OPT is off by a tenth in old versions.
        _, whole = run_with_ra(model, IDS, metric=times(1.0))
        for layer in range(N_LAYERS):
            assert ra["ra", layer].dtype == torch.float32
            off = relative(ra["ra", layer], wanted["ra", layer])
            assert off < 0.03 or off < 1.1 * relative(
                small * whole["ra", layer], wanted["ra", layer]
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, *every_model(torch.float32, torch.float64)])
@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_other_dtypes_are_differentiated_as_they_are(arch, kind, dtype, shared):
    """At the pattern, where a hook of the user's sees the gradient that the model computes."""
    model, seen = shared(arch, kind, dtype), []
    hook = ("blocks.1.attn.hook_pattern", lambda grad, hook: seen.append(grad.clone()))
    with model.hooks(bwd_hooks=[hook]):
        _, ra = run_with_ra(model, IDS, metric=times(2.0**-13))
    assert torch.equal(seen[0].to(ra["ra", 0].dtype), ra["pattern_grad", 1])


# Solved examples, question and answer; the model is sure of the last one (loss 6e-4 to 9e-4).
CAPITALS = ["France Paris", "Italy Rome", "Spain Madrid", "Japan Tokyo", "Germany Berlin"]
CAPITALS += ["Russia Moscow", "Greece Athens", "Egypt Cairo"]


def asked(first, n):
    pairs = [pair.split() for pair in CAPITALS[first : first + n + 1]]
    shots = "".join(f"Q: {country}\nA: {city}\n\n" for country, city in pairs[:-1])
    return f"{shots}Q: {pairs[-1][0]}\nA:", f" {pairs[-1][1]}"


SURE = [asked(0, 2), asked(3, 2), asked(3, 4)]


@pytest.fixture(scope="module")
def demo():
    loaded = {}

    def get(kind, dtype):
        if (kind, dtype) not in loaded:
            loaded[kind, dtype] = load_demo_model(kind=kind, dtype=dtype)
        return loaded[kind, dtype]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_which_the_model_is_sure_keep_their_maps(kind, demo):
    model, exact = demo(kind, HALF), demo(kind, torch.float64)
    unsure, wrong = asked(0, 0)[0], " Berlin"
    for prompt, answer in SURE:
        _, wanted = run_with_ra(exact, prompt, target=answer)
        assert float(wanted.loss) < 1e-3
        _, ra = run_with_ra(model, prompt, target=answer)
        assert relative(ra.stack(), wanted.stack()) < 0.015
        # Beside one with a loss of 19, whose gradients are a thousand times as large.
        _, both = run_with_ra(model, [prompt, unsure], target=[answer, wrong], padding_side="right")
        n = wanted["ra", 0].shape[-1]
        assert relative(both.stack()[:, 0, :, :n, :n], wanted.stack()[:, 0]) < 0.02


def strain(x, hook):
    """Leaves gradients as they are, by way of 8192 times as much: float16 ends at 65504."""
    x = x.clone()
    x.register_hook(lambda grad: grad * 8192 / 8192)
    return x


@pytest.mark.parametrize("store", ["maps", *every_model("mean")])
@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_what_would_overflow_is_run_again_with_less(arch, kind, store, shared):
    model, calls = shared(arch, kind, HALF), []
    count = ("blocks.0.hook_resid_pre", lambda x, hook: calls.append(1))
    options = {"target": TARGETS, "store": store, "batch_size": 1, "progress": False}
    _, wanted = run_with_ra(model, IDS, fwd_hooks=[count], **options)
    assert len(calls) == 2
    hooks = [count, ("blocks.1.hook_resid_post", strain)]
    _, ra = run_with_ra(model, IDS, fwd_hooks=hooks, **options)
    assert len(calls) == 2 + 3  # the second batch begins with what was enough for the first
    for layer in range(N_LAYERS):
        found, oracle = (
            cache["ra", layer] if store == "maps" else cache.mean()["ra", layer]
            for cache in (ra, wanted)
        )
        assert bool(found.isfinite().all())
        assert relative(found, oracle) < 0.01


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_is_refused(kind, dtype, shared):
    model = shared("gpt2", kind, dtype)

    def metric(logits):  # finite, and its derivative is not: that of the root of 0
        return (logits[:, -1, 5] - logits[:, -1, 5].detach()).clamp(min=0).sqrt()

    needed = r"gradient at the pattern of layer 2 of .* is NaN or infinite. Check the metric"
    with pytest.raises(NothingToDifferentiate, match=needed):
        run_with_ra(model, IDS, metric=metric)
