"""What is done with maps and models over two devices gives what it gives on one.

Every entry of the table uses a model, or the cache of a run with vectors, in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ra_lens import RACache, best_scale, check_model, run_with_ra
from ra_lens.experiments.facts import model_facts
from ra_lens.heads import head_effects, rank_heads
from ra_lens.hooks import get_ra_caching_hooks
from ra_lens.knockouts import knockout_hooks
from ra_lens.model import as_lens
from ra_lens.patching.masking import mask_heads
from ra_lens.paths import trace_layers, trace_paths
from ra_lens.report import write_head_page, write_report
from ra_lens.steps import gradient_norm, gradient_step, output_shift, pulls, step_effect
from ra_lens.tasks import Prompt
from ra_lens.token_scores import TOKEN_METHODS, token_scores
from ra_lens.vjp import WEIGHTS, weight_gradient, weight_norms
from ra_lens.vocabulary import read_vectors
from several_devices import CASES, home
from tiny_models import KINDS, OBSERVE_ONLY, random_ids, text

# Of a HookedTransformer, of grouped queries, and of a pattern that is only shown.
SOME = [
    case
    for case in CASES
    if case
    in (
        ("gpt2", "HookedTransformer"),
        ("llama", KINDS[-1]),
        ("opt", KINDS[-1]),
    )
]
IDS, TARGETS = random_ids(2, 7), [5, 11]
PROMPTS = [
    Prompt("w3 w4 w5 w20", " w6", corrupted=Prompt("w3 w7 w5 w20", " w8")),
    Prompt("w7 w8 w21", " w9", corrupted=Prompt("w5 w8 w21", " w3")),
    Prompt("w9 w4 w22 w12", " w16", corrupted=Prompt("w3 w11 w22 w12", " w18")),
]
QUIET = {"progress": False}
METHODS = [
    "ra",
    "w_norm",
    "michel",
    "atp",
    "knockout",
    "grad_sam",
    "ag",
    "grad_norm",
    "relp",
    "nap",
    "nap_ig",
    "zero",
    "mean",
    "resample",
    "fa",
    "fa_of_mean",
    "cm1",
    "cm1_last",
    "cm2",
]


def patched(model: Any, ra: RACache, **options: Any) -> Any:
    with torch.no_grad(), model.hooks(fwd_hooks=ra.mean().patch_hooks(scale=-10.0, **options)):
        return model(IDS.to(as_lens(model).device))


def with_hooks(model: Any, hooks: Any, ids: torch.Tensor = IDS) -> Any:
    with torch.no_grad():
        return model.run_with_hooks(ids.to(as_lens(model).device), fwd_hooks=hooks)


def own_backward(model: Any) -> Any:
    ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        model(IDS.to(as_lens(model).device))[:, -1].log_softmax(-1)[:, 5].sum().backward()
    torch.nn.Module.zero_grad(model)
    return dict(ra.items())


def of_activation_cache(model: Any) -> Any:
    cache, fwd, bwd = model.get_caching_hooks(incl_bwd=True)
    with model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
        model(IDS.to(as_lens(model).device))[:, -1].log_softmax(-1)[:, 5].sum().backward()
    torch.nn.Module.zero_grad(model)
    return dict(RACache.from_activation_cache(cache, model).items())


def padded(model: Any, **options: Any) -> Any:
    texts = [text(random_ids(n, seed=n)) for n in (4, 7)]
    logits, ra = run_with_ra(model, texts, target=[" w5", " w11"], **options)
    return [logits, dict(ra.items()), ra.norms()]


OF_CACHE: dict[str, Callable[[RACache], object]] = {
    "stack": lambda ra: [ra.stack(kind) for kind in ("ra", "knockout", "cut")],
    "norms": lambda ra: [ra.norms(kind) for kind in ("ra", "pattern", "knockout", "cut")],
    "top_heads": lambda ra: ra.top_heads(5),
    "to_dataframe": RACache.to_dataframe,
    "mean": lambda ra: ra.mean().by_layer("ra"),
    "slices": lambda ra: [
        dict(ra.apply_slice_to_batch_dim(one).items()) for one in (0, [1], ra.loss > 3)
    ],
    "to": lambda ra: [dict(ra.to(where).items()) for where in ("cpu", torch.float64)],
    "repr": repr,
    "loss_of": lambda ra: [ra.loss_of(0), ra.facts(1)],
    "top_edges": lambda ra: ra.top_edges(6).to_dataframe(),
    "edges": lambda ra: ra.knockout(queries=-1, keys=[1, 2]),
    "flow": lambda ra: [ra.flow(), ra.flow(heads=[(0, 1), (3, 2)])],
    "weights": lambda ra: [weight_norms(ra, one) for one in WEIGHTS],
    "weight": lambda ra: [weight_gradient(ra, "W_Q", (layer, 1)) for layer in (0, 3)],
    "pulls": lambda ra: [pulls(ra, (layer, 1)) for layer in (0, 3)],
}
OF_MODEL: dict[str, Callable[[Any, RACache], object]] = {
    "patch": patched,
    "patch, renormalised": lambda model, ra: patched(model, ra, renormalise=True),
    "knockout": lambda model, ra: with_hooks(
        model, knockout_hooks(model, ra.edges(queries=-1, keys=[1, 2]))
    ),
    "masked": lambda model, _ra: with_hooks(model, mask_heads(model, [(0, 1), (3, 2)])),
    "step": lambda model, ra: with_hooks(model, gradient_step(model, ra, None, 0.05)),
    "gradient_norm": lambda model, ra: gradient_norm(model, ra),
    "step_effect": lambda model, ra: step_effect(model, IDS, ra, None, 0.01, target=TARGETS),
    "output_shift": lambda model, ra: output_shift(model, IDS, ra, (3, 1), 0.01, target=TARGETS),
    "pulls after a step": lambda model, ra: pulls(
        ra, (3, 1), eta=0.01, model=model, input=IDS, target=TARGETS
    ),
    "best_scale": lambda model, ra: best_scale(
        model, ra, IDS, TARGETS, scales=(-10.0, 0.0, 10.0), **QUIET
    ),
    "token_scores": lambda model, ra: [
        token_scores(ra, method=method, model=model) for method in TOKEN_METHODS
    ],
    "vocabulary": lambda model, ra: [read_vectors(ra, model, (layer, 1), k=3) for layer in (0, 3)],
    "trace_paths": lambda model, ra: [
        trace_paths(ra, follow=follow).to_dataframe() for follow in ("pattern", "knockout")
    ],
    "trace_layers": lambda model, ra: [
        trace_layers(ra, follow="knockout").to_dataframe(),
        trace_layers(model, IDS[:1], follow="value_norm").to_dataframe(),
    ],
    "check_model": lambda model, _ra: check_model(model).ok,
    "own backward": lambda model, _ra: own_backward(model),
    "activation cache": lambda model, _ra: of_activation_cache(model),
    "to activation cache": lambda model, ra: dict(ra.to_activation_cache(model).items()),
    "padded": lambda model, _ra: padded(model),
    "padded, left": lambda model, _ra: padded(model, padding_side="left", recompute=True),
    "facts": lambda model, _ra: model_facts(as_lens(model))["weights_hash"],
    "effects": lambda model, _ra: head_effects(model, PROMPTS, **QUIET),
    **{
        f"rank by {method}": lambda model, _ra, method=method: rank_heads(
            model, PROMPTS[:: 2 if method == "fa_of_mean" else 1], method=method, **QUIET
        )
        for method in METHODS
    },
}


def plain(found: Any) -> Any:
    """What can be compared, in the host's memory."""
    if isinstance(found, torch.Tensor):
        return home(found).double().numpy()
    if isinstance(found, pd.DataFrame):
        columns = {name: found[name].astype(object) for name in found}
        return {name: c.where(c.notna(), None).tolist() for name, c in columns.items()}
    if is_dataclass(found):
        return {field.name: plain(getattr(found, field.name)) for field in fields(found)}
    if isinstance(found, Mapping):
        return {str(name): plain(value) for name, value in found.items()}
    return [plain(one) for one in found] if isinstance(found, list | tuple) else found


def check_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            check_same(found[name], value)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            check_same(one, other)
    elif isinstance(wanted, float | np.ndarray):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    elif not type(wanted).__module__.startswith("ra_lens"):  # which is no number
        assert found == wanted


def run(model: Any) -> RACache:
    return run_with_ra(model, IDS, target=TARGETS, vectors=True)[1]


@pytest.mark.every_model
@pytest.mark.parametrize("use", OF_CACHE)
@pytest.mark.parametrize(("arch", "kind"), SOME)
def test_a_cache_over_two_devices_gives_what_one_does(arch, kind, use, two):
    over, alone = (load(arch, kind, torch.float64) for load in (two.over, two.alone))
    wanted = plain(OF_CACHE[use](run(alone)))
    check_same(plain(OF_CACHE[use](run(over))), wanted)


@pytest.mark.every_model
@pytest.mark.parametrize("use", OF_MODEL)
@pytest.mark.parametrize(("arch", "kind"), SOME)
def test_a_model_over_two_devices_does_what_one_does(arch, kind, use, two):
    over, alone = (load(arch, kind, torch.float64) for load in (two.over, two.alone))
    if use == "patch, renormalised" and (arch, kind) in OBSERVE_ONLY:
        pytest.skip("the pattern is only shown")
    if use == "activation cache" and kind == "TransformerBridge":
        pytest.skip("it has no get_caching_hooks")
    wanted = plain(OF_MODEL[use](alone, run(alone)))
    check_same(plain(OF_MODEL[use](over, run(over))), wanted)


@pytest.mark.every_model
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_maps_over_two_devices(kind, two, tmp_path):
    ra = run(two.over("gpt2", kind))
    ra.save(tmp_path / "ra.safetensors")
    again = RACache.load(tmp_path / "ra.safetensors")
    assert {value.device.type for value in again.values()} == {"cpu"}
    check_same(plain(dict(again.items())), plain(dict(ra.items())))
    for page in (
        write_report(ra, tmp_path / "ra.html"),
        write_head_page(ra, two.over("gpt2", kind), (3, 1), tmp_path / "head.html"),
    ):
        assert page.stat().st_size > 10_000
