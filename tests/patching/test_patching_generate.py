"""Patches inside model.generate, against loops of whole forward passes with edited patterns."""

from __future__ import annotations

import pytest
import torch

from generating import NEW, generate, need_sound_generate
from patches import IDS, POS, TARGET
from ra_lens import patch_hooks, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from tiny_models import CASES, KINDS, N_HEADS, N_LAYERS, OBSERVE_ONLY, random_ids, text

SCALE = -40.0
EXTRA = random_ids(3, POS + 2, seed=4)


@pytest.fixture
def sound(arch, kind, shared, reference):
    """Whether generate gives the model's own continuation without a patch."""
    plain = generate(shared(arch, kind), IDS, [])
    need_sound_generate(torch.equal(plain, oracle(reference(arch), IDS, lambda n: {})))


def oracle(reference, ids, deltas_at, **inputs):
    """Greedy continuation by Hugging Face in float64; `deltas_at(n)` by layer for n tokens."""
    tokens = ids
    for _ in range(NEW):
        logits = reference.logits(tokens, pattern_deltas=deltas_at(tokens.shape[1]), **inputs)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def at_the_beginning(maps, kind="ra", scale=SCALE):
    def deltas_at(n):
        deltas = {}
        for layer in range(N_LAYERS):
            deltas[layer] = torch.zeros(N_HEADS, n, n, dtype=torch.float64)
            deltas[layer][:, :POS, :POS] = scale * maps[kind, layer]
        return deltas

    return deltas_at


def at_the_end(maps, n_prompt, *, cached):
    def deltas_at(n):
        deltas = {}
        for layer in range(N_LAYERS):
            value = SCALE * maps["ra", layer].double()
            delta = torch.zeros(N_HEADS, n, n, dtype=torch.float64)
            if cached:  # the prompt as it was, then the last row at each new token
                delta[:, n_prompt - POS : n_prompt, n_prompt - POS : n_prompt] = value
                for new in range(n_prompt, n):
                    delta[:, new, new + 1 - POS : new + 1] = value[:, -1]
            else:
                delta[:, n - POS :, n - POS :] = value
            deltas[layer] = delta
        return deltas

    return deltas_at


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("prompt", ["as long as the map", "longer"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_on_the_left_generated_tokens_get_nothing(
    arch, kind, prompt, cached, shared, mean, reference, sound
):
    # On observed patterns too: the first row of an RA map is 0, so a token alone gets nothing.
    model, ids = shared(arch, kind), IDS if prompt == "as long as the map" else EXTRA
    hooks = mean(arch, kind).patch_hooks(scale=SCALE, align="left")
    found = generate(model, ids, hooks, use_past_kv_cache=cached)
    wanted = oracle(reference(arch), ids, at_the_beginning(mean(arch, kind)))
    assert torch.equal(found, wanted)
    assert not torch.equal(generate(model, ids, []), wanted)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_on_the_right_the_map_ends_at_the_newest_token(
    arch, kind, cached, shared, mean, reference, sound
):
    model = shared(arch, kind)
    hooks = mean(arch, kind).patch_hooks(scale=SCALE, align="right")
    if cached and (arch, kind) in OBSERVE_ONLY:
        needed = r"found 1 queries and 9 keys at layer 0.*through z.*use_past_kv_cache=False"
        with pytest.raises(UnsupportedModel, match=needed):
            generate(model, EXTRA, hooks)
        return
    found = generate(model, EXTRA, hooks, use_past_kv_cache=cached)
    deltas_at = at_the_end(mean(arch, kind), EXTRA.shape[1], cached=cached)
    wanted = oracle(reference(arch), EXTRA, deltas_at)
    assert torch.equal(found, wanted)
    assert not torch.equal(generate(model, EXTRA, []), wanted)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_on_the_right_a_cache_makes_a_difference(arch, kind, mean, reference):
    results = [
        oracle(reference(arch), EXTRA, at_the_end(mean(arch, kind), EXTRA.shape[1], cached=cached))
        for cached in (True, False)
    ]
    assert not torch.equal(*results)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_an_exact_fit_ends_with_the_prompt(arch, kind, cached, shared, mean, reference, sound):
    model, hooks = shared(arch, kind), mean(arch, kind).patch_hooks(scale=SCALE)
    once = generate(model, IDS, hooks, use_past_kv_cache=cached, max_new_tokens=1)
    wanted = oracle(reference(arch), IDS, at_the_beginning(mean(arch, kind)))
    assert torch.equal(once, wanted[:, : POS + 1])
    needed = r"found 7 tokens at layer 0, but the map to add has 6.*align='left'"
    with pytest.raises(BadInput, match=needed):
        generate(model, IDS, hooks, use_past_kv_cache=cached)


@pytest.mark.parametrize(("arch", "kind"), sorted(OBSERVE_ONLY & set(CASES)))
def test_a_cache_hides_values_that_an_observed_pattern_needs(arch, kind, shared, mean, reference):
    # The first row of a forward map is 1, so a token alone would be taken for a first token.
    model, maps = shared(arch, kind), mean(arch, kind)
    hooks = maps.patch_hooks(scale=2.0, kind="pattern", align="left")
    with pytest.raises(UnsupportedModel, match=r"1 queries and 7 keys.*use_past_kv_cache=False"):
        generate(model, IDS, hooks)
    wanted = oracle(reference(arch), IDS, at_the_beginning(maps, "pattern", 2.0))
    assert torch.equal(generate(model, IDS, hooks, use_past_kv_cache=False), wanted)
    later = maps.patch_hooks(scale=2.0, kind="pattern", align="left", rows=slice(1, None))
    free = generate(model, IDS, later, use_past_kv_cache=False)
    assert torch.equal(generate(model, IDS, later), free)


@pytest.mark.every_model
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_prompts_generate_what_they_generate_alone(kind, align, cached, shared, mean):
    model, maps = shared("llama", kind), mean("llama", kind)
    prompts = [text(row[:n]) for row, n in zip(IDS, (6, 3, 4), strict=True)]
    tokens = model.to_tokens(prompts, padding_side="left")
    mask = (tokens != model.tokenizer.pad_token_id).long()
    assert mask.sum(1).tolist() == [7, 4, 5]
    hooks = maps.patch_hooks(scale=SCALE, align=align, attention_mask=mask)
    settings = {"use_past_kv_cache": cached, "padding_side": "left"}
    plain = generate(model, prompts, [], **settings)[:, -NEW:]
    singly = [generate(model, prompt, [], use_past_kv_cache=cached)[0] for prompt in prompts]
    need_sound_generate(torch.equal(plain, torch.stack([row[-NEW:] for row in singly])))
    together = generate(model, prompts, hooks, **settings)
    own = maps.patch_hooks(scale=SCALE, align=align)
    changed = False
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, own, use_past_kv_cache=cached)
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])
        changed |= not torch.equal(alone[0], singly[row])
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_wider_than_the_prompt_is_refused(kind, shared, mean):
    mask = torch.ones(3, POS + 1, dtype=torch.long)
    hooks = mean("gpt2", kind).patch_hooks(scale=SCALE, align="left", attention_mask=mask)
    with pytest.raises(BadInput, match=r"found 6 tokens.*attention_mask has 7 columns"):
        generate(shared("gpt2", kind), IDS, hooks)


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_a_cache_that_forgets_is_refused(tmp_path):
    # A sliding window's cache keeps the last keys only: where they were is not told.
    import transformers

    from ra_lens.model import load_folder
    from saved_models import save_random
    from tiny_models import D_MODEL, D_VOCAB, tokenizer

    cfg = transformers.MistralConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=2,
    )
    save_random(cfg, tokenizer("llama"), tmp_path, seed=1)
    model = load_folder(tmp_path, kind="TransformerBridge", device="cpu")
    _, ra = run_with_ra(model, IDS, target=TARGET)
    assert ra.sites[0].window == 8

    def run(align, cached, n=POS, seed=0):
        maps = {0: torch.ones(N_HEADS, n, n)}
        hooks = patch_hooks(maps, ra.sites, scale=0.5, align=align)
        return generate(model, EXTRA, hooks, use_past_kv_cache=cached)

    needed = r"layer 0 attends to the last 8 tokens.*dropped.*use_past_kv_cache=False"
    with pytest.raises(UnsupportedModel, match=needed):
        run("right", cached=True)
    with pytest.raises(UnsupportedModel, match=needed):
        run("left", cached=True, n=10)
    # A map that ends before the window says nothing about the tokens that follow.
    assert torch.equal(run("left", cached=True), run("left", cached=False))
