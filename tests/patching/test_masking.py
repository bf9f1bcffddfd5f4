"""Masking heads through z, against rows of W_O set to zero in a separate Hugging Face model."""

from __future__ import annotations

import pytest
import torch
import transformers

from folded import fold
from oracle import HFHeads
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import as_lens, load_folder
from ra_lens.model.attention import value_biases_folded
from ra_lens.patching.masking import mask_heads, mask_hooks, need_heads, read_z
from ra_lens.prompts import Prompts
from saved_models import save_random
from tiny_models import (
    ANY_KIND,
    CASES,
    KINDS,
    N_HEADS,
    N_LAYERS,
    random_ids,
    relative,
    tokenizer,
)

IDS = random_ids(3, 7)
# Both have value biases; the others have none.
FOLDABLE = [(arch, kind) for arch, kind in CASES if arch in ("gpt2", "opt")]
ONE = [[(layer, head)] for layer in range(N_LAYERS) for head in (0, 2, 3)]
SEVERAL = [[(0, 1), (0, 3), (2, 0)], [(1, h) for h in range(N_HEADS)]]
EVERY = [[(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]]


def masked_by(heads, *, n_layers=N_LAYERS):
    keep = torch.ones(n_layers, N_HEADS, dtype=torch.bool)
    for layer, head in heads:
        keep[layer, head] = False
    return keep


def logits_with(model, keep, ids=IDS, more=()):
    hooks = mask_hooks(as_lens(model).sites, keep)
    with torch.no_grad():
        return model.run_with_hooks(ids, fwd_hooks=[*hooks, *more])


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_masking_is_zeroing_rows_of_w_o(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    clean = reference.logits(IDS)
    for heads in ONE + SEVERAL + EVERY:
        with reference.zeroed(heads):
            wanted = reference.logits(IDS)
        assert relative(clean, wanted) > 1e-3, heads
        assert relative(logits_with(model, masked_by(heads)), wanted) < 1e-5, heads
    assert relative(logits_with(model, masked_by([])), clean) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_every_example_can_have_heads_of_its_own(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    of_rows = [*SEVERAL, [(2, 3)]]
    found = logits_with(model, torch.stack([masked_by(heads) for heads in of_rows]))
    for row, heads in enumerate(of_rows):
        with reference.zeroed(heads):
            wanted = reference.logits(IDS[row : row + 1])
        assert relative(found[row : row + 1], wanted) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), FOLDABLE)
def test_the_output_bias_stays(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    for layer in range(N_LAYERS):
        reference.output(layer).bias.data.zero_()
    with reference.zeroed(EVERY[0]):
        without_bias = reference.logits(IDS)
    assert relative(logits_with(model, masked_by(EVERY[0])), without_bias) > 1e-2


@pytest.mark.parametrize(("arch", "kind"), FOLDABLE)
def test_folded_value_biases_stay_behind_and_are_all_that_does(arch, kind, shared, fresh, folder):
    heads, reference = SEVERAL[0], HFHeads(folder(arch))
    with reference.zeroed(heads):
        wanted = reference.logits(IDS)
    folded = fold(fresh(arch, kind), kind)
    assert relative(logits_with(folded, masked_by([])), reference.logits(IDS)) < 1e-5
    unfolded_error = relative(logits_with(shared(arch, kind), masked_by(heads)), wanted)
    folded_error = relative(logits_with(folded, masked_by(heads)), wanted)
    assert unfolded_error < 1e-5 < 1e-2 < folded_error

    # What stays behind is b_V·W_O of the heads masked: without it the two agree.
    def without(layer):
        left = torch.zeros(())
        for head in (h for i, h in heads if i == layer):
            weight, rows = reference.rows(layer, head)
            left = left + reference.value_bias(layer)[rows] @ weight[rows]
        return lambda out, hook: out - left

    more = [(f"blocks.{layer}.hook_attn_out", without(layer)) for layer in {i for i, _ in heads}]
    assert relative(logits_with(folded, masked_by(heads), more=more), wanted) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_folding_is_seen_where_there_is_something_to_fold(arch, kind, fresh):
    model = fresh(arch, kind)
    assert as_lens(model).value_biases_folded is False
    fold(model, kind, fold_value_biases=False)
    assert as_lens(model).value_biases_folded is False
    model = fold(fresh(arch, kind), kind)
    assert as_lens(model).value_biases_folded is (arch in ("gpt2", "opt"))


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_usual_processing_folds_the_shift_of_layer_norms_too(arch, kind, fresh, folder):
    # GPT-J has no value bias, but its layer norm has a shift, which becomes one and is folded.
    processed = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True}
    model = fold(fresh(arch, kind), kind, **processed)
    folded = arch != "llama"
    assert as_lens(model).value_biases_folded is folded
    reference, heads = HFHeads(folder(arch)), [(0, 1), (1, 2)]
    with reference.zeroed(heads):
        wanted = reference.logits(IDS).log_softmax(-1)
    found = logits_with(model, masked_by(heads)).log_softmax(-1)
    assert (relative(found, wanted) > 1e-2) is folded
    if not folded:
        assert relative(found, wanted) < 1e-5


def saved(cfg, where):
    return save_random(cfg, tokenizer("gpt2"), where, seed=1)


SIZES = {"vocab_size": 34, "hidden_size": 24, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_bias_without_value_biases_is_not_taken_for_folding(kind, tmp_path):
    cfg = transformers.GPTNeoConfig(
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=16,
        window_size=8,
        **SIZES,
    )
    model = load_folder(saved(cfg, tmp_path), kind=kind, device="cpu")
    layers = [f"blocks.{i}.attn" for i in range(2)]
    assert value_biases_folded(model, layers) is False
    assert value_biases_folded(fold(model, kind), layers) is False
    # The shift of the layer norm becomes a value bias when it is folded, and that can be folded on.
    model = fold(load_folder(tmp_path, kind=kind, device="cpu"), kind, fold_ln=True)
    assert value_biases_folded(model, layers) is True


@pytest.mark.parametrize("kind", KINDS)
def test_value_biases_folded_into_an_output_bias_that_was_not_there_are_seen(kind, tmp_path):
    cfg = transformers.Qwen2Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        **SIZES,
    )
    model = load_folder(saved(cfg, tmp_path), kind=kind, device="cpu")
    assert as_lens(model).value_biases_folded is False
    assert as_lens(fold(model, kind)).value_biases_folded is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_head_that_is_nan_is_zero_all_the_same(kind, shared, folder):
    model, reference = shared("gpt2", kind), HFHeads(folder("gpt2"))

    def spoil(z, hook):
        z = z.clone()
        z[:, :, 2] = float("nan")
        return z

    with reference.zeroed([(1, 2)]):
        wanted = reference.logits(IDS)
    hooks = mask_hooks(as_lens(model).sites, masked_by([(1, 2)]))
    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.attn.hook_z", spoil), *hooks])
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_head_can_get_what_it_gave_in_another_run(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    lens, other = as_lens(model), random_ids(3, 7, seed=5)
    z = read_z(lens, as_prompts(other))
    for layer, found in z.items():
        wanted = reference.z(other)[layer].reshape(found.shape)
        assert relative(found, wanted) < 1e-5
    of_rows = [[(0, 1)], [(1, 3)], [(2, 0)]]
    keep = torch.stack([masked_by(heads) for heads in of_rows])
    found = swapped(model, keep, z)
    mean = {layer: of_layer.mean(dim=(0, 1), keepdim=True) for layer, of_layer in z.items()}
    found_mean = swapped(model, keep, mean)
    for row, [(layer, head)] in enumerate(of_rows):
        part = slice(row, row + 1)
        for logits, value in (
            (found, z[layer][part, :, head]),
            (found_mean, mean[layer][:, :, head]),
        ):
            with reference.replaced(layer, head, slice(None), value):
                wanted = reference.logits(IDS[part])
            assert relative(logits[part], wanted) < 1e-5
            assert relative(reference.logits(IDS[part]), wanted) > 1e-3


def as_prompts(ids, side="right"):
    return Prompts(tuple(map(tuple, ids.tolist())), None, side)


def swapped(model, keep, z):
    hooks = mask_hooks(as_lens(model).sites, keep, instead=z)
    with torch.no_grad():
        return model.run_with_hooks(IDS, fwd_hooks=hooks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_z_is_read_in_the_columns_of_the_batch_whatever_runs_together(kind, side, shared):
    lens = as_lens(shared("gpt2", kind))
    rows = (tuple(IDS[0].tolist()), tuple(IDS[1, :4].tolist()), tuple(IDS[2, :5].tolist()))
    prompts = Prompts(rows, None, side)
    found = [read_z(lens, prompts, batch_size=size) for size in (None, 1, 2)]
    for i, (row, start) in enumerate(zip(rows, prompts.starts, strict=True)):
        alone = read_z(lens, Prompts((row,), None, side))
        for layer, z in alone.items():
            for one in found:
                own = one[layer][i]
                assert relative(own[start : start + len(row)], z[0]) < 1e-5
                assert own.shape == (7, N_HEADS, 6)
                assert int((own != 0).any(dim=(1, 2)).sum()) == len(row)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_values_that_do_not_fit_are_refused(kind, shared):
    model = shared("gpt2", kind)
    z = read_z(as_lens(model), as_prompts(IDS))
    with pytest.raises(BadInput, match=r"no values in instead= for layer 1.*layers 0, 2\. Give \["):
        swapped(model, masked_by([(1, 0)]), {0: z[0], 2: z[2]})
    with pytest.raises(BadInput, match=r"shape \(3, 7, 3, 6\) for layer 1, which has 4 heads"):
        swapped(model, masked_by([(1, 0)]), {1: z[1][:, :, :3]})
    with pytest.raises(BadInput, match=r"\(3, 6, 4, 6\) where z is \(3, 7, 4, 6\).*as long"):
        swapped(model, masked_by([(1, 0)]), {1: z[1][:, :6]})
    # Heads that are kept get nothing of what is given for them.
    z[1][:, :, 1:] = float("nan")
    assert not swapped(model, masked_by([(1, 0)]), z).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_kept_whole_get_no_hook_and_a_wrong_mask_is_refused(kind, shared):
    lens = as_lens(shared("gpt2", kind))
    assert mask_hooks(lens.sites, masked_by([])) == []
    assert [name for name, _ in mask_hooks(lens.sites, masked_by([(1, 0)]))] == [
        "blocks.1.attn.hook_z"
    ]
    with pytest.raises(BadInput, match=r"shape \(3, 3\) for 3 layers of 4 heads.*= \[3, 4\]"):
        mask_hooks(lens.sites, torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_z_says_so(kind, shared):
    lens = as_lens(shared("gpt2", kind))
    need_heads(lens)
    lens.hook_points.pop("blocks.1.attn.hook_z")
    needed = r"no hook point 'blocks.1.attn.hook_z'.*neither zeroed nor replaced.*such as 'ra'"
    with pytest.raises(UnsupportedModel, match=needed):
        need_heads(lens)


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="HookedTransformer has no MLA")
def test_heads_of_latent_attention_are_those_of_the_pattern(tmp_path):
    cfg = transformers.DeepseekV3Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=5,
        max_position_embeddings=16,
        **SIZES,
    )
    folder = saved(cfg, tmp_path)
    model, reference = load_folder(folder, device="cpu"), HFHeads(folder)
    for heads in ([(0, 1)], [(1, 3), (0, 0)]):
        with reference.zeroed(heads):
            wanted = reference.logits(IDS)
        assert relative(reference.logits(IDS), wanted) > 1e-3
        assert relative(logits_with(model, masked_by(heads, n_layers=2)), wanted) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_some_heads_by_pair_label_or_ranking(arch, kind, shared):
    model = shared(arch, kind)
    heads = [(0, 1), (0, 3), (2, 0)]
    wanted = logits_with(model, masked_by(heads))
    given = [heads, ["L0H1", "L0H3", "L2H0"], [(0, -3), (0, 3), (-1, 0)]]
    assert N_LAYERS == 3 and N_HEADS == 4
    for some in given:
        with torch.no_grad():
            found = model.run_with_hooks(IDS, fwd_hooks=mask_heads(model, some))
        assert torch.equal(found, wanted)
    with pytest.raises(BadInput, match="L9H0"):
        mask_heads(model, "L9H0")
