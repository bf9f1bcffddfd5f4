"""Arguments of unusual types and forms, each with what should come of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from ra_lens import get_ra_caching_hooks, run_with_ra
from ra_lens.errors import BadInput, NotStored, RALensWarning, UnsupportedModel
from ra_lens.model import Lens, load_folder
from tiny_models import ANY_KIND, KINDS, random_ids, relative

IDS = random_ids(2, 5)
TARGET = 4


@pytest.fixture(params=ANY_KIND)
def model(request, shared):
    return shared("gpt2", request.param)


def test_integers_of_numpy_are_ids_and_positions(model):
    _, plain = run_with_ra(model, IDS, target=[4, 5], position=2)
    _, ra = run_with_ra(model, IDS, target=[np.int64(4), np.int64(5)], position=np.int64(2))
    assert relative(ra.stack(), plain.stack()) == 0
    _, ra = run_with_ra(model, IDS, target=torch.tensor([4, 5]), position=torch.tensor([2, 2]))
    assert relative(ra.stack(), plain.stack()) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([4.7], r"target 0 is \[4.7\].*token ids of one answer"),
        (["w4"], r"target 0 is \['w4'\].*Give text as text"),
        ([], r"target 0 is \[\].*at least one"),
        (True, r"target 0 is a bool; give text or a token id"),
        (None, r"target 0 is a NoneType; give text or a token id"),
    ],
)
def test_targets_that_are_no_tokens(target, message, model, request):
    if request.config.getoption("--check-shapes"):
        pytest.skip("the check of types is there first")
    with pytest.raises(BadInput, match=message):
        run_with_ra(model, "w4 w5", target=[target])


def test_a_position_that_is_no_integer(model):
    with pytest.raises(BadInput, match=r"position=tensor\(\[1\.5.*Give one integer"):
        run_with_ra(model, IDS, target=TARGET, position=torch.tensor([1.5, 2.0]))


def test_negative_layers_count_from_the_end_of_the_model(model):
    _, whole = run_with_ra(model, IDS, target=TARGET)
    _, ra = run_with_ra(model, IDS, target=TARGET, layers=[0, 1])
    assert relative(ra["ra", -2], whole["ra", 1]) < 1e-5
    assert ("ra", -1) not in ra


@pytest.mark.parametrize("layers", [slice(0, 2), 1.0, [1.0], "0", np.array([0.5])], ids=repr)
def test_layers_that_are_no_whole_numbers_are_refused_by_name(layers, model, request):
    if request.config.getoption("--check-shapes"):
        pytest.skip("the check of types is there first")
    _, ra = run_with_ra(model, IDS, target=TARGET)
    for call in (
        lambda: run_with_ra(model, IDS, target=TARGET, layers=layers),
        lambda: get_ra_caching_hooks(model, layers=layers),
        lambda: ra.mean().patch_hooks(scale=-1.0, layers=layers),
    ):
        with pytest.raises(BadInput, match=r"found layers=.*; give a whole number"):
            call()


@pytest.mark.parametrize("as_given", [np.int64, np.array, torch.tensor, lambda i: iter([i])])
def test_layers_of_any_integer_type(as_given, model):
    _, ra = run_with_ra(model, IDS, target=TARGET, layers=as_given(1))
    assert ra.layers == [1]
    assert ra["ra", 1].any()


def test_a_name_of_a_layer_that_is_not_collected(model):
    name = "blocks.0.attn.hook_ra"
    with pytest.raises(BadInput, match=r"blocks.0.attn.hook_ra.*no map of the layers collected"):
        run_with_ra(model, IDS, target=TARGET, layers=[1], names_filter=name)


def test_no_heads_are_no_answer(model):
    _, ra = run_with_ra(model, IDS, target=TARGET)
    with pytest.raises(BadInput, match=r"k=-1; give at least 1"):
        ra.top_heads(-1)


def test_hooks_say_when_gradients_are_off(model):
    _, fwd_hooks, _ = get_ra_caching_hooks(model)
    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=fwd_hooks),
        pytest.raises(UnsupportedModel, match=r"gradients switched off.*torch.enable_grad"),
    ):
        model(IDS)


def test_a_mean_in_low_precision_is_summed_in_full(model):
    ids = random_ids(40, 5)
    _, exact = run_with_ra(model, ids, target=TARGET, store="mean", batch_size=4, progress=False)
    _, rough = run_with_ra(
        model, ids, target=TARGET, store="mean", batch_size=4, progress=False, dtype=torch.bfloat16
    )
    low, full = rough.mean()["ra", 1], exact.mean()["ra", 1]
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, full.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"dtype": "float16"}, r"dtype='float16'; give torch.float16\."),
        ({"dtype": "torch.float16"}, r"dtype='torch.float16'; give torch.float16\."),
        ({"dtype": np.float32}, r"numpy.float32.*; give torch.float32\."),
        ({"dtype": "half precision"}, r"give one of torch, such as torch.float16"),
        ({"dtype": torch.int64}, r"dtype=torch.int64, which holds no floating-point numbers"),
        ({"dtype": torch.bool}, r"dtype=torch.bool, which holds no floating-point numbers"),
        ({"dtype": torch.complex64}, r"torch.complex64, which holds no floating-point numbers"),
        ({"device": "gpu"}, r"device='gpu'; give a device of torch, such as 'cpu' or 'cuda:0'"),
    ],
)
def test_where_and_in_what_maps_are_kept_is_read_first(options, needed, model, request):
    of_torch = all(isinstance(value, torch.dtype) for value in options.values())
    if request.config.getoption("--check-shapes") and not (of_torch or "device" in options):
        pytest.skip("the check of types is there first")
    seen = []
    hooks = [("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x))]
    for store in ("maps", "norms", "mean"):
        with pytest.raises(BadInput, match=needed):
            run_with_ra(model, IDS, target=TARGET, store=store, fwd_hooks=hooks, **options)
    with pytest.raises(BadInput, match=needed):
        get_ra_caching_hooks(model, **options)
    assert seen == []


def test_a_running_mean_moves_with_its_cache(model):
    _, ra = run_with_ra(model, IDS, target=TARGET, store="mean")
    assert ra.to(torch.float64).mean()["ra", 0].dtype == torch.float64


@pytest.mark.skipif("HookedTransformer" not in KINDS, reason="no HookedTransformer here")
def test_an_architecture_that_cannot_be_converted(folder):
    source = folder("gpt2")
    broken = source.parent / "broken"
    shutil.copytree(source, broken, dirs_exist_ok=True)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(BadInput, match=r"HookedTransformer cannot convert.*TransformerBridge"):
        load_folder(broken, kind="HookedTransformer")


def test_a_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder("gpt2") / "config.json").read_text())
    with pytest.raises(BadInput, match=r"cannot be loaded|cannot convert"):
        load_folder(tmp_path, kind=KINDS[0])


def test_a_metric_finds_the_last_token_of_texts_of_different_length(model):
    def metric(logits):
        return -logits[:, -1].log_softmax(-1)[:, TARGET]

    texts = ["w4 w5 w6 w7", "w8 w9"]
    _, both = run_with_ra(model, texts, metric=metric)
    for i, text in enumerate(texts):
        _, alone = run_with_ra(model, text, metric=metric)
        start, n = both.info.starts[i], len(alone.str_tokens[0])
        cut = both.stack()[:, i, :, start : start + n, start : start + n]
        assert relative(cut, alone.stack()[:, 0]) < 1e-5
    with pytest.warns(RALensWarning, match="different lengths and are padded on the right"):
        run_with_ra(model, texts, metric=metric, padding_side="right")


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_frozen_scores_on_a_first_run_do_not_make_a_bridge_observe_only(fresh):
    model = fresh("gpt2", "TransformerBridge")

    def frozen(scores, hook):
        return scores.detach() * 0 + 1.0

    run_with_ra(model, IDS, target=TARGET, fwd_hooks=[("blocks.1.attn.hook_attn_scores", frozen)])
    _, ra = run_with_ra(model, IDS, target=TARGET)
    assert [site.observe_only for site in ra.sites.values()] == [False, False, False]
    assert len(ra.mean().patch_hooks(scale=-1.0)) == 3


def test_a_mean_without_batch_dimension_keeps_every_head(model):
    _, ra = run_with_ra(model, IDS[:1], target=TARGET, store="mean")
    assert torch.equal(ra.remove_batch_dim().mean()["ra", -1], ra.mean()["ra", 2])


def test_mean_maps_of_some_layers_patch_those_layers(model):
    name = "blocks.1.attn.hook_ra"
    _, ra = run_with_ra(model, IDS, target=TARGET, store="mean", names_filter=name)
    assert [hook for hook, _ in ra.mean().patch_hooks(scale=-1.0)] == ["blocks.1.attn.hook_pattern"]
    with pytest.raises(NotStored, match=r"not among the mean maps: blocks\.1\.attn\.hook_ra"):
        ra.mean()["hook_pattern", 1]


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_a_hook_on_the_logits_sees_every_position(fresh):
    model = fresh("gpt2", "TransformerBridge")
    seen = []

    def first_only(logits, hook):
        seen.append(logits.shape[1])
        logits[:, 0, TARGET] += 50
        return logits

    hooks = [("unembed.hook_out", first_only)]
    _, plain = run_with_ra(model, IDS, target=TARGET)
    _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)
    assert seen == [5]
    assert relative(ra.loss, plain.loss) < 1e-6


def test_hooks_check_what_a_run_checks(model):
    with pytest.raises(UnsupportedModel, match="dropout acts before hook_pattern"):
        _train_with_dropout(model)


def _train_with_dropout(model):
    layer = torch.nn.Dropout(0.1)
    model.add_module("a_dropout", layer)
    try:
        get_ra_caching_hooks(model)
    finally:
        del model.a_dropout


def test_a_scalar_loss_belongs_to_no_example(model):
    _, ra = run_with_ra(model, IDS, metric=lambda logits: logits[:, -1, TARGET].sum())
    assert ra.apply_slice_to_batch_dim([0]).loss.isnan()


def test_a_list_of_bools_selects(model):
    _, ra = run_with_ra(model, IDS, target=[4, 5])
    chosen = ra.apply_slice_to_batch_dim([False, True])
    assert torch.equal(chosen.loss, ra.loss[1:])


def test_caches_compare_and_hash_by_identity(model):
    _, ra = run_with_ra(model, IDS, target=TARGET)
    assert ra == ra
    assert ra != run_with_ra(model, IDS, target=TARGET)[1]
    assert ra in {ra}


def test_norms_before_the_backward_pass_and_caches_without_maps(model):
    cache, _, _ = get_ra_caching_hooks(model)
    with pytest.raises(NotStored, match="run the backward pass first"):
        cache.top_heads(1)
    _, ra = run_with_ra(model, IDS, target=TARGET, store="norms")
    with pytest.raises(NotStored, match="store='norms'"):
        ra.to_activation_cache(model)


def test_a_piece_of_text_is_tokenised_as_it_stands_in_a_sentence():
    """SentencePiece puts a space in front of every text; inside one, " Paris" is one token."""
    pieces = ["<unk>", "▁", "▁Paris", "Paris", "▁:", ":", "▁of"]
    inner = Tokenizer(Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=0))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    model = torch.nn.Module()
    model.tokenizer = tokenizer
    lens = Lens(model, KINDS[0])
    assert tokenizer(" Paris", add_special_tokens=False)["input_ids"] == [1, 2]
    assert lens.encode_fragment(" Paris") == [2]


def test_unknown_words_are_found_by_a_tokenizer_that_gives_no_offsets(tmp_path):
    vocabulary = {"<unk>": 0, "w": 1, "x": 2, "w@@": 3, "x@@": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    model = torch.nn.Module()
    model.tokenizer = CTRLTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="<unk>"
    )
    lens = Lens(model, KINDS[0])
    assert not model.tokenizer.is_fast
    assert lens.unknown_words("w y xw zz y") == ["y", "zz"]
    assert lens.describe_unknown("w y") == "'y'; its tokenizer reads it as <unk>"
    assert lens.describe_unknown("w x") == ""
