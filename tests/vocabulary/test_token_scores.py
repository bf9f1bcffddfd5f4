"""Scores of tokens: by hand, and from the attentions and weights of Hugging Face's own model."""

from __future__ import annotations

import pytest
import torch

from ra_lens import run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.model import Site, Sites
from ra_lens.token_scores import TOKEN_METHODS, token_scores
from refused import unchecked
from tiny_models import CASES, D_HEAD, KINDS, N_HEADS, N_KV, N_LAYERS, random_ids, relative

IDS = random_ids(2, 6, seed=3)


def test_they_are_what_they_are_on_paper():
    """One head in each of two layers, two tokens."""
    sites = {i: Site(i, f"blocks.{i}.attn", 1, 1, 0.5) for i in (0, 1)}
    ra = RACache(Sites(sites))
    for layer, (a, r) in enumerate([((0.25, 0.75), (1.5, -1.5)), ((0.5, 0.5), (-1.0, 1.0))]):
        pattern = torch.tensor([[1.0, 0.0], list(a)])
        ra._put(layer, "pattern", pattern[None, None])
        ra._put(layer, "ra", torch.tensor([[0.0, 0.0], list(r)])[None, None])
        ra._put(layer, "pattern_grad", torch.zeros(1, 1, 2, 2))
    assert token_scores(ra).tolist() == [[-0.5, 0.5]]
    assert token_scores(ra, method="pattern").tolist() == [[0.75, 1.25]]
    # −R~/(1 − A), R~ = 2 R: −3/.75 + 2/.5 and 3/.25 − 2/.5.
    assert token_scores(ra, method="knockout").tolist() == [[0.0, 8.0]]
    # Of (.125, .875) below and (.25, .75) above: .25 + .75 · .125.
    rolled = token_scores(ra, method="rollout")
    assert rolled.tolist() == [[0.25 + 0.75 * 0.125, 0.75 * 0.875]]
    assert token_scores(ra, method="rollout", query=0).tolist() == [[1.0, 0.0]]
    assert token_scores(ra.remove_batch_dim(), method="rollout").tolist() == rolled[0].tolist()
    with pytest.raises(BadInput, match="found query=2; example 0 has 2 tokens"):
        token_scores(ra, method="rollout", query=2)


def heads_of(model, out):
    """Values and W_O of every layer, from weights and streams of Hugging Face's model."""
    cfg = model.config
    if cfg.model_type == "gpt2":
        for i, block in enumerate(model.transformer.h):
            x = block.ln_1(out.hidden_states[i])
            yield block.attn.c_attn(x).chunk(3, dim=-1)[2], block.attn.c_proj.weight
        return
    for i, block in enumerate(model.model.layers):
        x = block.input_layernorm(out.hidden_states[i])
        yield block.self_attn.v_proj(x), block.self_attn.o_proj.weight.T


@pytest.mark.parametrize(("arch", "kind"), [c for c in CASES if c[0] in ("gpt2", "llama")])
def test_norms_and_rollout_are_those_of_hugging_face(arch, kind, shared, reference):
    ours, theirs = shared(arch, kind), reference(arch).model
    with torch.no_grad():
        out = theirs(IDS, output_attentions=True, output_hidden_states=True)
    norms, seen = torch.zeros(2, 6).double(), torch.eye(6).double()
    for a, (value, w_o) in zip(out.attentions, heads_of(theirs, out), strict=True):
        n_kv = N_KV if arch == "llama" else N_HEADS
        per_head = value.reshape(2, 6, n_kv, D_HEAD).repeat_interleave(N_HEADS // n_kv, dim=2)
        for head in range(N_HEADS):
            written = per_head[:, :, head] @ w_o[head * D_HEAD : (head + 1) * D_HEAD]
            norms += a[:, head, -1] * written.norm(dim=-1)
        seen = (a.mean(dim=1) + torch.eye(6)) / 2 @ seen
    assert len(out.attentions) == N_LAYERS
    _, ra = run_with_ra(ours, IDS, target=[8, 9], vectors=["value"])
    assert relative(token_scores(ra, method="value_norm", model=ours), norms) < 1e-5
    assert relative(token_scores(ra, method="rollout"), seen[:, -1]) < 1e-5
    attended = sum(a[:, :, -1].sum(dim=1) for a in out.attentions)
    assert relative(token_scores(ra, method="pattern"), attended) < 1e-5
    by_hand = -sum(ra["ra", layer][:, :, -1].sum(dim=1) for layer in ra.layers)
    assert relative(token_scores(ra), by_hand) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_nowhere(side, shared):
    model = shared("llama", KINDS[0])
    rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
    options = {"vectors": ["value"], "progress": False}
    _, both = run_with_ra(model, rows, target=[8, 9], padding_side=side, **options)
    columns = slice(2, 6) if side == "left" else slice(0, 4)
    _, alone = run_with_ra(model, rows[1], target=9, **options)
    for method in TOKEN_METHODS:
        found = token_scores(both, method=method, model=model)
        assert found.shape == (2, 6)
        assert (
            relative(found[1, columns], token_scores(alone, method=method, model=model)[0]) < 1e-4
        )
        found[1, columns] = 0
        assert not found[1].any()


def test_what_cannot_be_scored_says_why(shared):
    model, other = shared("llama", KINDS[0]), shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, IDS, target=[8, 9])
    with pytest.raises(BadInput, match="method='value_norm' without model="):
        token_scores(ra, method="value_norm")
    with pytest.raises(NotStored, match=r"run_with_ra\(..., vectors=True\)"):
        token_scores(ra, method="value_norm", model=model)
    with pytest.raises(BadInput, match="found method='norm'; give one of 'ra', 'knockout'"):
        unchecked(token_scores)(ra, method="norm")
    _, of_relp = run_with_ra(model, IDS, target=[8, 9], backward="relp")
    with pytest.raises(BadInput, match=r"backward='relp'.*a score of tokens by it is made"):
        token_scores(of_relp, method="knockout")
    assert torch.equal(token_scores(of_relp, method="pattern"), token_scores(ra, method="pattern"))
    cross = Site(0, "decoder_blocks.0.cross_attn", 1, 1, 1.0, cross=True)
    with pytest.raises(UnsupportedModel, match="attends from one text to another"):
        token_scores(RACache(Sites({0: cross})))
    one_layer = run_with_ra(model, IDS, target=[8, 9], vectors=["value"])[1]
    one_layer.sites = Sites({0: Site(0, "blocks.0.attn", 3, 3, 1.0)})
    with pytest.raises(BadInput, match="has no layer 0 as the cache has"):
        token_scores(one_layer, method="value_norm", model=other)
