"""Refusals: the class, and the text: what was found, what is needed, what to call."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils.checkpoint import checkpoint

from ra_lens import check_model, get_ra_caching_hooks, load_model, run_with_ra
from ra_lens.errors import BadInput, NothingToDifferentiate, RALensError, UnsupportedModel
from ra_lens.model import available_kinds
from ra_lens.questions import mark
from ra_lens.targets import answer_nll, logit_diff, sequence_nll
from refused import unchecked
from tiny_models import ANY_KIND, CASES, D_VOCAB, KINDS, N_CTX, load, random_ids

IDS = random_ids(2, 5)
ONE = random_ids(1, 5)


def mask(*rows):
    return torch.tensor(rows)


BAD_INPUT = {
    "unknown layer": (
        IDS,
        {"layers": 7},
        r"layers=\[7\].*layers 0…2.*negative counts from the end",
    ),
    "unknown layers": (IDS, {"layers": [0, -4, 3]}, r"layers=\[-4, 3\].*0…2"),
    "no layer": (IDS, {"layers": []}, r"found layers without a number in it; give at least one"),
    "bools for layers": (IDS, {"layers": [True, False]}, r"layers=True; give a whole number"),
    "id out of vocabulary": (IDS, {"target": D_VOCAB}, r"target 34 is not in the voc.*0 to 33"),
    "negative id": (IDS, {"target": -1}, r"target -1 is not in the vocabulary.*0 to 33"),
    "unknown word": (IDS, {"target": " Paris"}, r"' Paris' is not a word.*vocabulary"),
    "empty target": (IDS, {"target": ""}, r"target 0 is empty text.*at least one token"),
    "wrong number": (IDS, {"target": [3, 4, 5]}, r"3 targets for 2 prompts.*one per prompt"),
    "wrong number, one prompt": (
        ONE,
        {"target": [3, 4]},
        r"2 targets for 1 prompt\..*sequence_nll",
    ),
    "wrong number of wrongs": (IDS, {"target": logit_diff(3, [4, 5, 6])}, r"3 wrong answers for 2"),
    "target of a float": (ONE, {"target": torch.tensor([0.5])}, r"target 0 is a float"),
    "several tokens in a difference": (
        IDS,
        {"target": logit_diff("w4 w5", "w6")},
        r"correct answer.*must be one token; found 2: 'w4' \+ 'w5'.*mind the leading space",
    ),
    "several wrong tokens": (
        IDS,
        {"target": logit_diff("w4", "w5 w6")},
        r"wrong answer.*must be one token; found 2: 'w5' \+ 'w6'",
    ),
    "several tokens at a position": (
        IDS,
        {"target": "w4 w5", "position": 2},
        r"position together with an answer of 2 tokens.*Leave position out",
    ),
    "empty prompt": ("", {}, r"prompt 0 is empty.*at least one token"),
    "blank prompt": ("  ", {"prepend_bos": False}, r"prompt 0.*at least one token"),
    "an empty one of several": (["w4", ""], {}, r"prompt 1 is empty"),
    "no prompts": ([], {}, r"empty list of prompts"),
    "empty tensor": (
        torch.zeros(1, 0, dtype=torch.long),
        {},
        r"shape \(1, 0\).*at least one token",
    ),
    "three dimensions": (IDS[None], {}, r"shape \(1, 2, 5\); \[batch, pos\]"),
    "too long": (random_ids(1, N_CTX + 1), {}, r"17 tokens \(answer included\).*at most 16"),
    "too long with answer": (
        random_ids(1, N_CTX),
        {"target": "w4 w5"},
        r"18 tokens \(answer included\).*at most 16.*longer context",
    ),
    "float ids": (IDS.float(), {}, r"torch.float32 tensor.*integers.*to_tokens"),
    "input id too large": (IDS + D_VOCAB, {}, r"token id \d+;.*ids 0 to 33"),
    "input id negative": (IDS - 50, {}, r"token id -\d+;.*ids 0 to 33"),
    "mask of another shape": (
        IDS,
        {"attention_mask": torch.ones(2, 4)},
        r"attention_mask of shape \(2, 4\) for token ids of shape \(2, 5\)",
    ),
    "mask with a gap": (
        IDS,
        {"attention_mask": mask([1, 1, 0, 1, 1], [1] * 5)},
        r"row 0 of attention_mask has a gap.*Pad on one side",
    ),
    "mask on both sides": (
        IDS,
        {"attention_mask": mask([0, 1, 1, 1, 1], [1, 1, 1, 1, 0])},
        r"padded on different sides",
    ),
    "mask of nothing": (
        IDS,
        {"attention_mask": mask([0] * 5, [1] * 5)},
        r"row 0.*no real token",
    ),
    "mask with text": ("w4 w5", {"attention_mask": mask([1, 1])}, r"attention_mask with text"),
    "BOS with ids": (IDS, {"prepend_bos": True}, r"prepend_bos=True with token ids.*Pass text"),
    "unknown hook": (
        IDS,
        {"fwd_hooks": [("blocks.0.attn.hook_patern", print)]},
        r"no hook point 'blocks.0.attn.hook_patern'.*Did you mean 'blocks.0.attn.hook_pattern'",
    ),
    "unknown filter": (
        IDS,
        {"names_filter": ["blocks.0.attn.hook_ra", "blocks.0.attn.hook_q"]},
        r"names_filter has 'blocks.0.attn.hook_q'.*hook_ra",
    ),
    "target and metric": (
        IDS,
        {"target": 3, "metric": lambda logits: logits[:, -1, 3]},
        r"both target and metric. Give one",
    ),
    "scalar of several batches": (
        IDS,
        {"metric": lambda logits: logits[:, -1, 3].sum(), "batch_size": 1, "progress": False},
        r"one scalar for each of 2 batches.*one value per example",
    ),
    "metric of a wrong shape": (
        IDS,
        {"metric": lambda logits: logits[:, -1]},
        r"the metric gave shape \(2, 34\).*shape \[2\].*scalar",
    ),
    "metric with a position": (
        IDS,
        {"metric": lambda logits: logits[:, -1, 3], "position": 2},
        r"position together with a metric",
    ),
    "position outside": (IDS, {"position": 5}, r"position 5 lies outside prompt 0.*-5 to 4"),
    "position outside, negative": (IDS, {"position": [0, -6]}, r"position -6 .* prompt 1, .*5 tok"),
    "number of positions": (IDS, {"position": [0, 1, 2]}, r"3 positions for 2 prompts"),
    "batch size": (IDS, {"batch_size": 0}, r"batch_size=0; give a positive"),
    "mean of lengths": (
        ["w4 w5", "w4"],
        {"store": "mean"},
        r"prompts of 2 to 3 tokens.*store='mean'.*Group the prompts by length",
    ),
    "mean of lengths, batches": (
        ["w4 w5", "w4"],
        {"store": "mean", "batch_size": 1, "progress": False},
        r"same length.*Group the prompts by length",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("kind", ANY_KIND)
def test_bad_input_is_refused_with_what_was_found_and_what_to_do(kind, case, shared):
    given, options, text = BAD_INPUT[case]
    if "target" not in options and "metric" not in options:
        options = {"target": 4, **options}
    with pytest.raises(BadInput, match=f"(?s){text}") as caught:
        run_with_ra(shared("llama" if case != "unknown word" else "gpt2", kind), given, **options)
    assert isinstance(caught.value, ValueError | RALensError)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_prompt_that_is_a_number_is_refused(kind, shared):
    with pytest.raises((BadInput, TypeCheckError)):
        run_with_ra(shared("gpt2", kind), ["w4", 5], target=4)


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_with_dropout_is_refused(kind, fresh):
    model = fresh("gpt2", kind).train()
    has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    if not has_dropout:  # HookedTransformer has none
        before = run_with_ra(model.eval(), IDS, target=4)[1]
        after = run_with_ra(model.train(), IDS, target=4)[1]
        assert torch.equal(before.stack(), after.stack())
        return
    with pytest.raises(UnsupportedModel, match=r"train mode.*probability 0.1.*Call model.eval\(\)"):
        run_with_ra(model, IDS, target=4)
    run_with_ra(model.eval(), IDS, target=4)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_is_refused(kind, shared, folder):
    model = shared("gpt2", kind)  # which other tests use: not loaded in there
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedModel, match=r"inference_mode\(\).*torch.no_grad\(\) instead"),
    ):
        run_with_ra(model, IDS, target=4)
    with torch.inference_mode():
        made_there = load(folder("gpt2"), kind)
    if not any(p.is_inference() for p in torch.nn.Module.parameters(made_there)):
        _, wanted = run_with_ra(shared("gpt2", kind), IDS, target=4)
        _, ra = run_with_ra(made_there, IDS, target=4)
        assert torch.equal(ra.stack(), wanted.stack())
        return
    with pytest.raises(UnsupportedModel, match=r"parameters were created under .*inference_mode"):
        run_with_ra(made_there, IDS, target=4)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_nan_weights_are_refused(kind, fresh):
    model = fresh("gpt2", kind)
    with torch.no_grad():
        list(torch.nn.Module.parameters(model))[5].fill_(float("nan"))
    with pytest.raises(
        NothingToDifferentiate, match=r"logits of .* contain NaN.*Check the weights"
    ):
        run_with_ra(model, IDS, target=4)


def zeros(value, hook):
    return torch.zeros_like(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_without_attention_is_refused(kind, shared):
    model = shared("llama", kind)
    run_with_ra(model, IDS, target=4)
    needed = r"does not depend on the attention.*no gradient reached hook_pattern"
    for metric in (
        lambda logits: logits.detach()[:, -1, 3],
        lambda logits: torch.ones(2, requires_grad=True),
        lambda logits: torch.ones(2),
    ):
        with pytest.raises(NothingToDifferentiate, match=needed):
            run_with_ra(model, IDS, metric=metric)
    with pytest.raises(NothingToDifferentiate, match=needed):
        run_with_ra(model, IDS, target=4, fwd_hooks=[("blocks.2.hook_resid_post", zeros)])
    with pytest.raises(NothingToDifferentiate, match=r"finite value per example"):
        run_with_ra(model, IDS, metric=lambda logits: logits[:, -1, 3] / 0)


@contextmanager
def changed(module, change):
    """A module of the model's own that gives something else; no hook."""
    forward = module.forward
    vars(module)["forward"] = lambda *args, **kwargs: change(forward, *args, **kwargs)
    try:
        yield
    finally:
        del vars(module)["forward"]


def detached(forward, *args, **kwargs):
    out = forward(*args, **kwargs)
    return out.detach() if isinstance(out, torch.Tensor) else (out[0].detach(), *out[1:])


def rounded(forward, x, *args, **kwargs):
    """An unembedding of integers: a gradient comes back, and it is 0."""
    return forward(x.round(), *args, **kwargs)


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_layers_that_the_model_itself_cuts_off_are_refused(arch, kind, met, fresh):
    model = fresh(arch, kind)
    _, whole = run_with_ra(model, IDS, target=4)
    model = model if met else fresh(arch, kind)
    needed = (
        r"no gradient reaches the attention of layers \[0, 1\], and no hook on the model cuts them "
        r"off: the model itself does, between layer 1 and the loss.*layers= above it"
    )
    with changed(model.blocks[1], detached):
        for options in ({}, {"recompute": True}, {"store": "norms"}, {"layers": [0, 1, 2]}):
            with pytest.raises(NothingToDifferentiate, match=needed):
                run_with_ra(model, IDS, target=4, **options)
        _, ra = run_with_ra(model, IDS, target=4, layers=[2])
        assert torch.allclose(ra["ra", 2], whole["ra", 2], atol=1e-6)
        # A hook may be what cuts: its maps are zero, as before.
        if met:
            hooks = [("blocks.0.hook_resid_pre", lambda x, hook: x)]
            _, ra = run_with_ra(model, IDS, target=4, fwd_hooks=hooks)
            assert not ra["ra", 1].any()
            assert torch.equal(ra["pattern", 1], whole["pattern", 1])


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"store": "mean"}, {"layers": [0]}])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_of_zeros_by_the_models_own_doing_are_refused(arch, kind, options, fresh):
    model = fresh(arch, kind)
    first = max(options.get("layers", [2]))
    needed = (
        rf"gradient is 0 everywhere from layer {first} on down, although it is not at the logits "
        r"and no hook on the model cuts it off.*in floating point"
    )
    for _ in range(2):
        with changed(model.unembed, rounded), pytest.raises(NothingToDifferentiate, match=needed):
            run_with_ra(model, IDS, target=4, **options)
        run_with_ra(model, IDS, target=4)
    with changed(model.unembed, rounded):
        hooks = [("blocks.0.hook_resid_pre", lambda x, hook: x)]
        _, ra = run_with_ra(model, IDS, target=4, fwd_hooks=hooks)
    assert not ra["pattern_grad", 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_maps_that_are_zero_by_right_are_no_error(kind, fresh):
    model = fresh("gpt2", kind)
    # One token: the softmax has nothing to share out.
    _, ra = run_with_ra(model, IDS[:, :1], target=4)
    assert not ra.stack().any()
    assert ra.stack("pattern_grad").any()
    # A hinge that is met: the loss does not change with the logits.
    _, ra = run_with_ra(model, IDS, metric=lambda logits: (logits[:, -1, 4] - 1e6).clamp(min=0))
    assert not ra.stack("pattern_grad").any()
    # A loss so small that squares of its gradients are 0.
    tiny = 2.0**-90
    _, ra = run_with_ra(model, IDS, metric=lambda logits: tiny * logits[:, -1, 4])
    assert ra["pattern_grad", 1].any()
    # A layer whose heads write nothing, beside others.
    attn = model.blocks[1].attn
    with torch.no_grad():
        (attn.W_O if kind == "HookedTransformer" else attn.o.original_component.weight).zero_()
    _, ra = run_with_ra(model, IDS, target=4)
    assert not ra["pattern_grad", 1].any()
    assert ra["pattern_grad", 0].any()


def test_a_model_of_another_library_is_refused(reference):
    hugging_face = reference("gpt2").model
    needed = r"GPT2LMHeadModel.*HookedTransformer or TransformerBridge.*load_model"
    with pytest.raises(UnsupportedModel, match=needed):
        run_with_ra(hugging_face, IDS, target=4)
    with pytest.raises(UnsupportedModel, match=needed):
        get_ra_caching_hooks(hugging_face)


class Around(torch.nn.Module):
    """A wrapper as those of PEFT, which holds the model as `base_model.model`."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile's own
@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_are_refused_with_the_model_inside(kind, shared, reference):
    model = shared("gpt2", kind)
    for wrapped, where in (
        (torch.compile(model), "_orig_mod"),
        (torch.nn.DataParallel(model), "module"),
        (Around(model), "base_model.model"),
        (torch.nn.DataParallel(Around(model)), "module.base_model.model"),
    ):
        needed = rf"found a .*{type(wrapped).__name__} around a {kind}.* give model\.{where}\.$"
        for call in (lambda m: run_with_ra(m, IDS, target=4), get_ra_caching_hooks, check_model):
            with pytest.raises(UnsupportedModel, match=needed):
                call(wrapped)
        inside = wrapped.get_submodule(where)
        assert torch.equal(
            run_with_ra(inside, IDS, target=4)[1].stack(),
            run_with_ra(model, IDS, target=4)[1].stack(),
        )
    needed = r"Around;.*boot_transformers\(name, hf_model=model\.base_model\.model\)"
    with pytest.raises(UnsupportedModel, match=needed):
        run_with_ra(Around(reference("gpt2").model), IDS, target=4)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_gradient_checkpointing_in_train_mode_is_refused(reentrant, fresh):
    model = fresh("llama", "TransformerBridge")
    _, wanted = run_with_ra(model, IDS, target=4)
    inside = model.train().original_model
    inside.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    needed = r"train mode with gradient checkpointing.*Call model.eval\(\) first, or gradient_check"
    for call in (lambda: run_with_ra(model, IDS, target=4), lambda: get_ra_caching_hooks(model)):
        with pytest.raises(UnsupportedModel, match=needed):
            call()
    inside.gradient_checkpointing_disable()
    assert torch.equal(run_with_ra(model, IDS, target=4)[1].stack(), wanted.stack())
    inside.gradient_checkpointing_enable()
    assert torch.equal(run_with_ra(model.eval(), IDS, target=4)[1].stack(), wanted.stack())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_checkpoints_by_itself_is_refused(reentrant, kind, shared):
    model = shared("llama", kind)
    _, wanted = run_with_ra(model, IDS, target=4)

    def again(forward, *args, **kwargs):
        if "past_key_values" in kwargs:  # to which the second pass would add
            kwargs["past_key_values"] = None
        return checkpoint(lambda *a: forward(*a, **kwargs), *args, use_reentrant=reentrant)

    needed = "switches gradients off by itself before" if reentrant else "fired twice in one run"
    with (
        changed(model.blocks[1], again),
        pytest.raises(UnsupportedModel, match=rf"{needed}.*as gradient checkpointing does"),
    ):
        run_with_ra(model, IDS, target=4)
    assert torch.equal(run_with_ra(model, IDS, target=4)[1].stack(), wanted.stack())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_the_meta_device_is_refused(kind, fresh, capsys):
    model = fresh("gpt2", kind).to("meta")
    needed = r"gpt2.* is on the meta device, where tensors have a shape and no values. Load it with"
    for ids in (IDS, IDS.to("meta")):
        for call in (
            lambda ids=ids: run_with_ra(model, ids, target=4),
            lambda: get_ra_caching_hooks(model),
            lambda: check_model(model),
        ):
            with pytest.raises(UnsupportedModel, match=needed):
                call()
    if kind == "TransformerBridge":
        model.cfg.device = "cpu"  # weights may be there that the configuration does not know of
        with pytest.raises(UnsupportedModel, match=needed):
            run_with_ra(model, IDS, target=4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k == "HookedTransformer"])
def test_a_model_without_patterns_is_refused(kind, fresh):
    model = fresh("gpt2", kind)
    model.hook_dict = {k: v for k, v in model.hook_dict.items() if not k.endswith("pattern")}
    needed = r"no hook point named blocks.\{layer\}.attn.hook_pattern.*found: none.*load_model"
    with pytest.raises(UnsupportedModel, match=needed):
        run_with_ra(model, IDS, target=4)


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_a_tokenizer_is_refused_and_ids_are_not(kind, fresh):
    model = fresh("gpt2", kind)
    model.tokenizer = None
    with pytest.raises(BadInput, match=r"no tokenizer.*Pass token ids"):
        run_with_ra(model, "w4 w5", target=4)
    with pytest.raises(BadInput, match=r"no tokenizer"):
        run_with_ra(model, IDS, target=" w4")
    _, ra = run_with_ra(model, IDS, target=4)
    assert ra.str_tokens == [[f"#{int(i)}" for i in row] for row in IDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_without_backward_then_another_is_refused(kind, fresh):
    model = fresh("gpt2", kind)
    _, fwd_hooks, _ = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks):
        model(IDS)
        with pytest.raises(UnsupportedModel, match=r"fired twice before a backward pass"):
            model(IDS)


@pytest.mark.filterwarnings("ignore:HookedTransformer.from_pretrained is deprecated")
@pytest.mark.parametrize("kind", [None, *available_kinds()])
def test_what_cannot_be_loaded_is_refused_by_the_public_class(kind):
    with pytest.raises(BadInput, match=r"could not load 'no-such-model'") as refused:
        load_model("no-such-model", kind=kind)
    assert refused.type is BadInput


def test_objectives_say_what_they_need_outside_a_run():
    logits = torch.zeros(2, 3, 10)
    with pytest.raises(BadInput, match=r"needs token ids.*to_single_token"):
        answer_nll(" Paris")(logits)
    with pytest.raises(BadInput, match=r"logits of 2 examples"):
        answer_nll([1, 2, 3])(logits)
    one, two = unchecked(answer_nll), unchecked(logit_diff)
    for without in (one(None), two(None, 5), two(5, None)):
        with pytest.raises(BadInput, match=r"found tokens None for logits of 2 examples"):
            without(logits)
    with pytest.raises(BadInput, match=r"sequence_nll.*Pass it as run_with_ra"):
        sequence_nll(" Paris")(logits)


def test_stated_shapes_are_checked_where_asked_for(request):
    if not request.config.getoption("--check-shapes"):
        pytest.skip("without --check-shapes")
    with pytest.raises(TypeCheckError):
        mark(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))
