"""What the benchmark of pointing calls rollout and so on, against Hugging Face's own model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import pointing
from ra_lens import load_model, run_with_ra
from ra_lens.model import available_kinds
from saved_models import randomise, save, word_tokenizer


@pytest.fixture(params=available_kinds())
def both(request, tmp_path):
    """A small Llama of two layers, with eager attention and in TransformerLens."""
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    ).eval()
    randomise(theirs, seed=0)
    words = word_tokenizer([f"w{i}" for i in range(64)], bos_token="w0", unk_token="w63")
    save(theirs, words, tmp_path)
    return theirs, load_model(tmp_path, kind=request.param, device="cpu", dtype=torch.float32)


def test_methods_are_what_they_are_called(both):
    theirs, ours = both
    ids, target = torch.tensor([[5, 9, 3, 17, 8, 21, 4]]), 30
    out = theirs(ids, output_attentions=True)
    for attention in out.attentions:
        attention.retain_grad()
    out.logits[0, -1].log_softmax(dim=-1)[target].backward()
    # In words: of the log-probability, so that what raises it is positive.
    pull = [a.detach() * a.grad for a in out.attentions]
    _, ra = run_with_ra(ours, ids, target=target, vectors=["value"])
    found = pointing.of_maps(ours, ra)

    def close(name, wanted):
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6, msg=name)

    close("−A·G", sum(p[0, :, -1].sum(dim=0) for p in pull))
    close("A", sum(a.detach()[0, :, -1].sum(dim=0) for a in out.attentions))
    seen, relevance = torch.eye(7), torch.eye(7)
    for a, p in zip(out.attentions, pull, strict=True):
        mixed = a.detach()[0].mean(dim=0) / 2 + torch.eye(7) / 2
        seen = mixed @ seen
        relevance = relevance + p[0].relu().mean(dim=0) @ relevance
    close("rollout", seen[-1])
    close("Chefer", relevance[-1])
    # Where one key is left out, the others share what it had: each row by hand.
    knockout = torch.zeros(7)
    for a, p in zip(out.attentions, pull, strict=True):
        row, gain = a.detach()[0, :, -1], -p[0, :, -1] / a.detach()[0, :, -1]
        for key in range(7):
            without = row.clone()
            without[:, key] = 0
            without /= without.sum(dim=-1, keepdim=True)
            knockout[key] += ((without - row) * gain).sum()
    close("knockout", knockout)


def test_gradients_at_the_embeddings_are_those_of_captum(both):
    from captum.attr import LayerGradientXActivation  # brings matplotlib

    theirs, ours = both
    ids, target = torch.tensor([[5, 9, 3, 17, 8, 21, 4]]), 30

    def chance(tokens):
        return theirs(tokens).logits[:, -1].log_softmax(dim=-1)[:, target]

    wanted = LayerGradientXActivation(chance, theirs.model.embed_tokens).attribute(ids)
    found = pointing.input_times_gradient(ours, ids, target)
    torch.testing.assert_close(found, wanted.detach()[0].sum(dim=-1), rtol=1e-4, atol=1e-6)
    assert not ours.get_submodule("embed")._forward_hooks
    # Integrated gradients add up to what the model gains on the way.
    gained = (chance(ids) - chance(torch.full_like(ids, 5)))[0].detach()
    found = pointing.integrated_gradients(ours, ids, target)
    torch.testing.assert_close(found.sum(), gained, rtol=2e-2, atol=1e-2)


def test_the_table_counts_hits(both):
    _, ours = both
    asked = [
        pointing.Asked("one", "w1 w2 w3", 7, "w2"),
        pointing.Asked("one", "w1 w2 w3 w4", 7, "w3"),
    ]
    frame = pointing.measure(ours, asked, front=True, captum=False)
    assert set(frame.hit) <= {0.0, 0.5, 1 / 3, 1.0}
    chance = frame[frame.method == "chance"].hit.tolist()
    assert chance == [1 / 2, 1 / 3]  # the last token and the one in front do not count
    assert list(pointing.table(frame).columns) == ["one"]
