"""Cuts inside model.generate, against loops of whole forward passes of Hugging Face's model."""

from __future__ import annotations

import pytest
import torch

from cuts import as_edges, boxed, minus_infinity
from generating import NEW, generate, need_sound_generate
from patches import IDS, POS, TARGET
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.knockouts import Edge, knockout_hooks
from tiny_models import CASES, KINDS, N_HEADS, N_LAYERS, OBSERVE_ONLY, random_ids, text


def by_hand(reference, ids, cells_at):
    """Greedy continuation in float64; `cells_at(n)` are the edges cut in a text of n tokens."""
    tokens = ids
    for _ in range(NEW):
        n = tokens.shape[1]
        deltas = minus_infinity([cells_at(n)] * len(ids), N_LAYERS, N_HEADS, n)
        logits = reference.logits(tokens, deltas)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.fixture
def sound(arch, kind, shared, reference):
    """Whether generate gives the model's own continuation without a cut."""
    plain = generate(shared(arch, kind), IDS, [])
    need_sound_generate(torch.equal(plain, by_hand(reference(arch), IDS, lambda n: [])))


@pytest.fixture
def ra(arch, kind, shared):
    return run_with_ra(shared(arch, kind), IDS, target=TARGET)[1]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_edges_of_the_prompt(arch, kind, cached, shared, reference, sound, ra):
    # Generated tokens look at everything.
    model = shared(arch, kind)
    cells = boxed([0, 1, 2], range(N_HEADS), [3, 4, 5], [0, 1, 2])
    found = generate(model, IDS, knockout_hooks(model, as_edges(cells)), use_past_kv_cache=cached)
    assert torch.equal(found, by_hand(reference(arch), IDS, lambda n: cells))
    assert not torch.equal(found, generate(model, IDS, []))
    closed = ra.edges(queries=slice(3, 6), keys=slice(0, 3))
    again = generate(model, IDS, knockout_hooks(model, closed), use_past_kv_cache=cached)
    assert torch.equal(again, found)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_set_without_an_end_goes_on_with_what_is_generated(
    arch, kind, cached, shared, reference, sound, ra
):
    model = shared(arch, kind)
    hooks = knockout_hooks(model, ra.edges(queries=slice(-1, None), keys=[0, 1, 2, 4]))

    def cells_at(n):
        return boxed([0, 1, 2], range(N_HEADS), range(POS - 1, n), [0, 1, 2, 4])

    if cached and (arch, kind) in OBSERVE_ONLY:
        needed = r"found 1 queries and 7 keys at layer 0.*edges are cut through z.*past_kv_cache=F"
        with pytest.raises(UnsupportedModel, match=needed):
            generate(model, IDS, hooks)
        return
    found = generate(model, IDS, hooks, use_past_kv_cache=cached)
    wanted = by_hand(reference(arch), IDS, cells_at)
    assert torch.equal(found, wanted)
    of_the_prompt = by_hand(reference(arch), IDS, lambda n: cells_at(POS))
    assert not torch.equal(of_the_prompt, wanted)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), [case for case in CASES if case not in OBSERVE_ONLY])
def test_keys_without_an_end_are_generated_tokens_too(
    arch, kind, cached, shared, reference, sound, ra
):
    # The first three tokens are all that is left to look at.
    model = shared(arch, kind)
    hooks = knockout_hooks(model, ra.edges(keys=slice(3, None)))

    def cells_at(n):
        cells = boxed(range(N_LAYERS), range(N_HEADS), range(n), range(3, n))
        return [cell for cell in cells if cell[3] <= cell[2]]

    found = generate(model, IDS, hooks, use_past_kv_cache=cached)
    assert torch.equal(found, by_hand(reference(arch), IDS, cells_at))
    assert not torch.equal(found, generate(model, IDS, []))


@pytest.mark.every_model
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_prompts_generate_what_they_generate_alone(kind, cached, shared):
    model = shared("llama", kind)
    prompts = [text(row[:n]) for row, n in zip(IDS, (6, 3, 4), strict=True)]
    tokens = model.to_tokens(prompts, padding_side="left")
    mask = (tokens != model.tokenizer.pad_token_id).long()
    assert mask.sum(1).tolist() == [7, 4, 5]
    _, ra = run_with_ra(model, prompts, target="w5")
    chosen = ra.edges(queries=slice(-1, None), keys=[0, 1, 2])
    settings = {"use_past_kv_cache": cached, "padding_side": "left"}
    plain = generate(model, prompts, [], **settings)[:, -NEW:]
    singly = [generate(model, prompt, [], use_past_kv_cache=cached)[0] for prompt in prompts]
    need_sound_generate(torch.equal(plain, torch.stack([row[-NEW:] for row in singly])))
    hooks = knockout_hooks(model, chosen, attention_mask=mask)
    together = generate(model, prompts, hooks, **settings)
    changed = False
    for i, prompt in enumerate(prompts):
        _, one = run_with_ra(model, prompt, target="w5")
        own = knockout_hooks(model, one.edges(queries=slice(-1, None), keys=[0, 1, 2]))
        alone = generate(model, prompt, own, use_past_kv_cache=cached)
        assert torch.equal(together[i, -NEW:], alone[0, -NEW:])
        changed |= not torch.equal(alone[0], singly[i])
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_wider_than_the_prompt_is_refused(kind, shared):
    model = shared("gpt2", kind)
    run_with_ra(model, IDS, target=TARGET)
    mask = torch.ones(3, POS + 1, dtype=torch.long)
    hooks = knockout_hooks(model, Edge(0, 1, 3, 2), attention_mask=mask)
    with pytest.raises(BadInput, match=r"found 6 tokens.*attention_mask has 7 columns"):
        generate(model, IDS, hooks)


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
    ids = random_ids(3, POS + 2, seed=4)
    _, ra = run_with_ra(model, ids, target=TARGET)
    needed = r"layer 0 attends to the last 8 tokens.*dropped.*use_past_kv_cache=False"
    onward = knockout_hooks(model, ra.edges(queries=slice(-1, None), keys=-2))
    with pytest.raises(UnsupportedModel, match=needed):
        generate(model, ids, onward)
    generate(model, ids, onward, use_past_kv_cache=False)
    # Edges of the prompt say nothing about the tokens that follow.
    ended = knockout_hooks(model, ra.edges(queries=-2, keys=[2, 3, 4, 5]))
    free = generate(model, ids, ended, use_past_kv_cache=False)
    assert torch.equal(generate(model, ids, ended), free)
