"""Models over two devices: the maps of one, made where their layers lie and left there.

Simulated devices refuse what GPUs refuse and count what moves; two GPUs run the same tests.
"""

from __future__ import annotations

from collections import Counter

import accelerate
import pytest
import torch
import transformers

from ra_lens import check_model, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import as_lens, load_folder, load_model
from ra_lens.model.sites import STORED_KINDS
from several_devices import CASES, N_LAYERS, SIZES, device_map, home
from simulated_devices import Copies
from tiny_models import D_MODEL, KINDS, N_HEADS, random_ids, relative, text

IDS, TARGETS = random_ids(2, 7), [5, 11]
PADDED = [text(random_ids(n, seed=n)) for n in (4, 7)]
RUNS = {
    "maps": {},
    "norms": {"store": "norms"},
    "mean": {"store": "mean"},
    "recompute": {"recompute": True},
    "rows": {"recompute": True, "store": "norms", "query_rows": 3},
    "vectors": {"vectors": True},
    "batches": {"batch_size": 1, "progress": False},
    "last layers": {"layers": [-1, -2]},
    "relp": {"backward": "relp"},
    "auto": {"batch_size": "auto", "progress": False},
}
PARTLY = [case for case in CASES if case != CASES[0]]


def check_equal(found, wanted, devices):
    """Every map, vector, norm and mean, and where they lie, by layer."""
    assert list(found) == list(wanted)
    for layer, device in zip(found.layers, devices, strict=True):
        for name in found.sites.names_of(layer) if hasattr(found.sites, "names_of") else ():
            assert name
        prefix = f"{found.sites[layer].prefix}."
        for name in filter(lambda name: name.startswith(prefix), found):
            assert str(found[name].device) == device, name
            if float(wanted[name].norm()) > 0:
                assert relative(home(found[name]), home(wanted[name])) < 1e-6, name
            else:
                assert float(found[name].norm()) == 0, name
    for kind in STORED_KINDS:
        if (kind, found.layers[0]) in found._norms:
            assert relative(home(found.norms(kind)), home(wanted.norms(kind))) < 1e-6
    torch.testing.assert_close(home(found.loss), home(wanted.loss), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_are_those_of_one_device(arch, kind, run, two):
    model, alone, options = two.over(arch, kind), two.alone(arch, kind), RUNS[run]
    logits, found = run_with_ra(model, IDS, target=TARGETS, **options)
    wanted_logits, wanted = run_with_ra(alone, IDS, target=TARGETS, **options)
    devices = [two.of_layers[layer] for layer in found.layers]
    check_equal(found, wanted, devices)
    assert relative(home(logits), home(wanted_logits)) < 1e-6
    if found.store != "norms":
        for kind_of_map in STORED_KINDS:
            means = found.mean().by_layer(kind_of_map)
            for layer, value in wanted.mean().by_layer(kind_of_map).items():
                assert relative(home(means[layer]), home(value)) < 1e-6
                assert str(means[layer].device) == two.of_layers[layer]
