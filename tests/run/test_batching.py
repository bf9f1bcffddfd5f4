"""The maps of an example are its own: alone, in any batch, padded left or right, by any route."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from padded_rows import padded, part
from ra_lens import run_with_ra
from ra_lens.errors import RALensWarning
from tiny_models import ANY_KIND, CASES, N_HEADS, N_LAYERS, random_ids, relative, text

LENGTHS = (5, 9, 7)
IDS = [random_ids(n, seed=n) for n in LENGTHS]
TARGETS = [5, 8, 11]
KIND_OF_MAP = ("ra", "pattern", "pattern_grad")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_an_example_has_the_same_maps_alone_and_in_a_padded_batch(arch, kind, side, shared):
    model = shared(arch, kind)
    tokens, mask = padded(side, 3, IDS)
    logits, ra = run_with_ra(model, tokens, attention_mask=mask, target=TARGETS)
    for i, row in enumerate(IDS):
        own_logits, alone = run_with_ra(model, row, target=TARGETS[i])
        assert relative(logits[i, -1], own_logits[0, -1]) < 1e-5
        assert relative(ra.loss[i], alone.loss[0]) < 1e-5
        for layer in range(N_LAYERS):
            for kind_of_map in KIND_OF_MAP:
                found = part(ra[kind_of_map, layer], i, side, len(row))
                assert relative(found, alone[kind_of_map, layer][0]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_strings_are_padded_like_tokens(arch, kind, side, shared):
    model = shared(arch, kind)
    prompts = [text(row) for row in IDS]
    _, ra = run_with_ra(model, prompts, target=TARGETS, padding_side=side)
    bos = torch.tensor([model.tokenizer.bos_token_id])
    for i, row in enumerate(IDS):
        _, alone = run_with_ra(model, torch.cat([bos, row]), target=TARGETS[i])
        for layer in range(N_LAYERS):
            found = part(ra["ra", layer], i, side, len(row) + 1)
            assert relative(found, alone["ra", layer][0]) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_neighbours_and_batch_size_change_nothing(arch, kind, shared):
    model = shared(arch, kind)
    first = random_ids(1, 6, seed=1)
    batches = [torch.cat([first, random_ids(n, 6, seed=n)]) for n in (1, 4)]
    _, alone = run_with_ra(model, first, target=7)
    for tokens in batches:
        for size in (None, 1, 2, 3):
            logits, ra = run_with_ra(model, tokens, target=7, batch_size=size, progress=False)
            assert logits.shape[0] == len(ra.loss) == ra.batch_size == len(tokens)
            assert relative(ra.loss[:1], alone.loss) < 1e-5
            for layer in range(N_LAYERS):
                assert relative(ra["ra", layer][:1], alone["ra", layer]) < 1e-5
                assert relative(ra.norms()[:1], alone.norms()) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_batches_of_different_widths_join_to_the_single_batch(kind, side, shared):
    model = shared("gpt2", kind)
    prompts = [text(row) for row in IDS]
    options = {"target": ["w4", "w5 w6", "w7 w8 w9"], "padding_side": side}
    for return_logits in ("read", "all"):
        logits, whole = run_with_ra(model, prompts, return_logits=return_logits, **options)
        cut_logits, cut = run_with_ra(
            model, prompts, return_logits=return_logits, batch_size=1, progress=False, **options
        )
        torch.testing.assert_close(cut_logits[:, -1], logits[:, -1], rtol=1e-4, atol=1e-5)
        assert cut_logits.shape == logits.shape
        assert relative(cut.stack(), whole.stack()) < 1e-5
        assert relative(cut.loss, whole.loss) < 1e-5
        assert cut.str_tokens == whole.str_tokens
        assert cut.info == whole.info


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_padding_of_a_token_tensor_without_mask_is_found(arch, kind, side, shared):
    # As TransformerLens's to_tokens makes it: BOS in front, the tokenizer's pad token at the side.
    model = shared(arch, kind)
    bos, pad = model.tokenizer.bos_token_id, model.tokenizer.pad_token_id
    rows = [torch.cat([torch.tensor([bos]), row]) for row in IDS]
    tokens, mask = padded(side, pad, rows)
    _, given = run_with_ra(model, tokens, attention_mask=mask, target=TARGETS)
    # Where the pad token is also the end of a text, the guess is announced.
    same = pad == model.tokenizer.eos_token_id
    announced = pytest.warns(RALensWarning, match="taken as padded. Pass attention_mask")
    with announced if same else nullcontext():
        _, found = run_with_ra(model, tokens, target=TARGETS)
    assert found.str_tokens == given.str_tokens
    assert relative(found.stack(), given.stack()) < 1e-6


@pytest.mark.parametrize("kind", ANY_KIND)
def test_an_end_of_text_token_inside_or_alone_is_read_not_taken_for_padding(kind, shared):
    model = shared("gpt2", kind)  # its pad token is its end-of-text token
    inside = random_ids(2, 6)
    inside[:, 3] = 0
    at_the_end = random_ids(6)
    at_the_end[-1] = 0
    for tokens in (inside, at_the_end):
        _, ra = run_with_ra(model, tokens, target=5)
        assert [len(row) for row in ra.info.str_tokens] == [6] * ra.batch_size


@pytest.mark.parametrize("kind", ANY_KIND)
def test_text_and_ids_of_the_same_prompt_give_the_same(kind, shared):
    model = shared("llama", kind)
    ids = random_ids(6)
    _, from_ids = run_with_ra(model, torch.cat([torch.tensor([1]), ids]), target=9)
    _, from_text = run_with_ra(model, text(ids), target="w9")
    _, without_bos = run_with_ra(model, text(ids), target="w9", prepend_bos=False)
    assert from_text.str_tokens == from_ids.str_tokens == [["<s>", *text(ids).split()]]
    assert from_text.info.prepended == "<s>"
    assert without_bos.info.prepended == ""
    assert from_ids.info.prepended is None
    assert without_bos["ra", 0].shape == (1, N_HEADS, 6, 6)
    assert relative(from_text.stack(), from_ids.stack()) < 1e-6


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_bos_written_in_the_prompt_is_told_from_one_prepended(kind, shared):
    model = shared("gpt2", kind)
    _, written = run_with_ra(model, "<|endoftext|> w4 w5", target=9, prepend_bos=False)
    assert written.info.prepended == ""
    assert written.str_tokens == [["<|endoftext|>", "w4", "w5"]]
    _, both = run_with_ra(model, "<|endoftext|> w4 w5", target=9, prepend_bos=True)
    assert both.str_tokens == [["<|endoftext|>", "<|endoftext|>", "w4", "w5"]]
    assert both.info.prepended == "<|endoftext|>"


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_progress_bar_is_shown_for_several_batches_only(kind, shared, capfd):
    model, tokens = shared("gpt2", kind), random_ids(4, 5)
    run_with_ra(model, tokens, target=5)
    run_with_ra(model, tokens, target=5, batch_size=2, progress=False)
    assert "Reversed Attention" not in capfd.readouterr().err
    run_with_ra(model, tokens, target=5, batch_size=2)
    assert "2/2" in capfd.readouterr().err
