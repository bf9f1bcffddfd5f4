"""Control maps: what they keep of Reversed Attention, and what they do not."""

from __future__ import annotations

import pytest
import torch

from ra_lens import load_demo_model, run_with_ra
from ra_lens.errors import NotStored
from ra_lens.model import Site, Sites
from ra_lens.patching.controls import control_maps
from ra_lens.patching.mean import MeanMaps

PROMPTS = ["Q: France\nA:", "Q: Japan\nA:", "Q: Italy\nA:"]
ANSWERS = [" Paris", " Tokyo", " Rome"]


@pytest.fixture(scope="module")
def mean():
    _, ra = run_with_ra(load_demo_model(), PROMPTS, target=ANSWERS, store="mean", progress=False)
    return ra.mean()


def test_a_shuffle_moves_the_entries_of_a_row_among_its_keys(mean):
    shuffled = control_maps(mean, "shuffled")
    moved = 0
    for layer, maps in shuffled.items():
        for head, of_head in enumerate(mean["ra", layer]):
            for query, row in enumerate(of_head):
                found = maps[head, query]
                # Sorted, a row is what it was; and no key after the query gets anything.
                assert sorted(found.tolist()) == sorted(row.tolist())
                assert not found[query + 1 :].any()
                moved += not torch.equal(found, row)
    rows = sum(maps.shape[0] * (maps.shape[1] - 1) for maps in shuffled.values())
    assert moved > rows / 2


def test_a_shuffle_is_that_of_its_seed(mean):
    one, same, other = (control_maps(mean, "shuffled", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[layer], same[layer]) for layer in one)
    assert any(not torch.equal(one[layer], other[layer]) for layer in one)
    # Layers are shuffled apart from each other.
    places = [one[layer][0, -1].argsort().tolist() for layer in one]
    of_ra = [mean["ra", layer][0, -1].argsort().tolist() for layer in one]
    assert len({tuple(map(was.index, now)) for was, now in zip(of_ra, places, strict=True)}) > 1


def test_the_gradient_is_as_large_as_ra_in_each_head(mean):
    for layer, maps in control_maps(mean, "grad").items():
        for head, found in enumerate(maps):
            grad = mean["pattern_grad", layer][head].tril()
            cosine = torch.cosine_similarity(found.flatten(), grad.flatten(), dim=0)
            assert cosine.item() == pytest.approx(1, abs=1e-5)
            assert found.norm().item() == pytest.approx(mean["ra", layer][head].norm().item())
            assert not found.triu(1).any()


def test_a_centred_gradient_moves_attention_between_the_keys_of_a_row(mean):
    for layer, maps in control_maps(mean, "centred_grad").items():
        for head, found in enumerate(maps):
            grad, ra = mean["pattern_grad", layer][head], mean["ra", layer][head]
            wanted = torch.zeros_like(grad)
            for query in range(len(grad)):  # of the keys up to the query, as attention is causal
                row = grad[query, : query + 1]
                wanted[query, : query + 1] = row - row.mean()
            wanted = wanted * (ra.norm() / wanted.norm())
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(found.sum(dim=-1), torch.zeros(len(grad)), atol=1e-6, rtol=0)


def test_a_times_g_is_the_mean_of_the_prompts_own_products():
    _, ra = run_with_ra(load_demo_model(), PROMPTS, target=ANSWERS, progress=False)
    mean = ra.mean("ra", "cut")
    apart = [
        run_with_ra(load_demo_model(), prompt, target=answer, progress=False)[1]
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    for layer, maps in control_maps(mean, "a_grad").items():
        products = sum(one["pattern", layer][0] * one["pattern_grad", layer][0] for one in apart)
        for head, found in enumerate(maps):
            wanted = products[head] * (mean["ra", layer][head].norm() / products[head].norm())
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_a_times_g_needs_the_products_of_the_prompts(mean):
    with pytest.raises(NotStored, match=r"\('cut', 0\) is not among the mean maps"):
        control_maps(mean, "a_grad")


def test_a_head_without_gradient_stays_without():
    site = Site(0, "blocks.0.attn", 1, 1, 0.5)
    pattern = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    maps = {site.map_name(kind): torch.zeros(1, 2, 2) for kind in ("ra", "pattern_grad")}
    mean = MeanMaps(Sites({0: site}), 1, {**maps, site.map_name("pattern"): pattern})
    for control in ("grad", "centred_grad"):
        assert control_maps(mean, control)[0].tolist() == [[[0, 0], [0, 0]]]
    assert control_maps(mean, "shuffled")[0].tolist() == [[[0, 0], [0, 0]]]
