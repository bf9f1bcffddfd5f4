"""The scale that is found: every loss of the curve, done by hand one prompt and scale at a time."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch

import arch_models
from left_behind import Oops, changes, raises, snapshot
from patches import adding, logits_with, pattern_of
from ra_lens import best_scale, patch_hooks, run_with_ra
from ra_lens.errors import BadInput, NothingToDifferentiate, NotStored, UnsupportedModel
from ra_lens.scales import PAPER_SCALES, SCALES, BestScale
from ra_lens.targets import answer_nll, logit_diff, sequence_nll
from refused import refused, unchecked
from tiny_models import CASES, EDITABLE, KINDS, N_LAYERS, OBSERVE_ONLY

PROMPTS = ["w5 w7 w9 w11", "w4 w6 w8 w10", "w3 w12 w8"]
ANSWERS = [" w8", " w9 w5", " w13"]
SCALED = (-30.0, -3.0, -0.5, 0.0, 2.0)
ALIKE = PROMPTS[:2]


def ids_of(model, i):
    """The tokens of a prompt with its answer, and how many of them are the answer."""
    return model.to_tokens(PROMPTS[i] + ANSWERS[i]), ANSWERS[i].count("w")


def edits(maps, scale, at="pattern"):
    """Hooks that add to the pattern or to the scores, written down once more."""

    def at_scores(value):
        def hook(pattern, hook):
            moved = pattern * (scale * value).exp()
            return moved / moved.sum(-1, keepdim=True)

        return hook

    add = at_scores if at == "scores" else lambda value: adding(scale * value)
    return [(pattern_of(layer), add(value)) for layer, value in maps.items()]


def by_hand(model, i, hooks):
    """Mean −log p of an answer's tokens, and the probability of all of them."""
    tokens, k = ids_of(model, i)
    logits = logits_with(model, hooks, tokens)[0].double()
    chances = [logits[-k - 1 + j].log_softmax(-1)[tokens[0, -k + j]].item() for j in range(k)]
    return -sum(chances) / k, math.exp(sum(chances))


@pytest.fixture
def close():
    def check(found, wanted):
        assert float(found) == pytest.approx(wanted, rel=2e-4, abs=1e-6)

    return check


@pytest.mark.parametrize("at", ["pattern", "scores"])
@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_each_prompts_own_map_is_added_at_every_scale(arch, kind, at, shared, close):
    # Prompts of different lengths, and an answer of two tokens among those of one.
    model = shared(arch, kind)
    _, ra = run_with_ra(model, PROMPTS, target=ANSWERS)
    found = best_scale(
        model, ra, PROMPTS, ANSWERS, scales=SCALED, at=at, batch_size=3, progress=False
    )
    assert found.scales == SCALED
    assert found.at == at
    for i in range(len(PROMPTS)):
        n = ids_of(model, i)[0].shape[1]  # all answers are appended where one has several tokens
        start = ra.info.starts[i]
        span = slice(start, start + n)
        maps = {layer: ra["ra", layer][i, :, span, span] for layer in range(N_LAYERS)}
        for s, scale in enumerate(SCALED):
            loss, chance = by_hand(model, i, edits(maps, scale, at))
            close(found.loss_per_prompt[i, s], loss)
            close(found.probability[i, s], chance)
    close(found.loss_per_prompt[0, SCALED.index(0.0)], float(ra.loss[0]))


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_mean_maps_are_added_to_every_prompt(arch, kind, shared, close):
    # Through z where the model only shows its pattern.
    model = shared(arch, kind)
    targets = [" w8", " w9"]
    _, ra = run_with_ra(model, ALIKE, target=targets)
    mean = ra.mean()
    found = best_scale(model, mean, ALIKE, targets, scales=SCALED, progress=False)
    for i, (prompt, target) in enumerate(zip(ALIKE, targets, strict=True)):
        for s, scale in enumerate(SCALED):
            tokens = model.to_tokens(prompt)
            if (arch, kind) in OBSERVE_ONLY:
                hooks = mean.patch_hooks(scale=scale)
            else:
                hooks = edits({layer: mean["ra", layer] for layer in range(N_LAYERS)}, scale)
            log_p = logits_with(model, hooks, tokens)[0, -1].double().log_softmax(-1)
            loss = -log_p[model.to_single_token(target)].item()
            close(found.loss_per_prompt[i, s], loss)
            close(found.probability[i, s], math.exp(-loss))


def test_heads_layers_rows_and_alignment_are_those_of_patch_hooks(shared, close):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=sequence_nll([" w8", " w9"]))
    mean = ra.mean()  # of five tokens and an answer
    target = model.to_single_token(" w13")
    variants = [
        {"align": "left", "heads": ["L1H2", (0, 1)]},
        {"align": "right", "layers": [0]},
        {"align": "left", "rows": [3]},
        {"align": "left", "renormalise": True},
        {"align": "left", "kind": "pattern"},
    ]
    for options in variants:
        found = best_scale(
            model, mean, [PROMPTS[2]], " w13", scales=SCALED, progress=False, **options
        )
        losses = []
        for scale in SCALED:
            hooks = mean.patch_hooks(scale=scale, **options)
            logits = logits_with(model, hooks, model.to_tokens(PROMPTS[2]))
            losses.append(-logits[0, -1].double().log_softmax(-1)[target].item())
        assert found.losses.tolist() == pytest.approx(losses, rel=2e-4), options
        assert len({round(loss, 6) for loss in losses}) > 2, options


def test_the_best_scale_is_that_of_the_smallest_mean_loss():
    losses = torch.tensor([[3.0, 1.0, 2.0, 4.0], [3.0, 2.0, 1.5, 1.0]], dtype=torch.float64)
    found = BestScale((-4.0, -2.0, 0.0, 1.0), losses, (-losses).exp())
    assert found.losses.tolist() == [3.0, 1.5, 1.75, 2.5]
    assert (found.scale, found.loss, found.unpatched_loss) == (-2.0, 1.5, 1.75)
    assert not found.at_the_end
    one = found.of_prompts(1)
    assert (one.scale, one.loss, one.unpatched_loss, one.at_the_end) == (1.0, 1.0, 1.5, True)
    assert found.probability_at(-4.0) == pytest.approx(math.exp(-3.0))
    with pytest.raises(BadInput, match=r"found scale=-5.0, which was not tried; these were: −4,"):
        found.loss_at(-5.0)
    with pytest.raises(FrozenInstanceError):
        found.scales = ()
    with pytest.raises(BadInput, match="2 is none of the 2 prompts"):
        found.of_prompts(2)


def test_of_equal_losses_that_nearest_to_no_patch_is_best_and_nan_never():
    nan = math.nan
    losses = torch.tensor([[nan, 1.0, 1.0, 1.0, nan]], dtype=torch.float64)
    found = BestScale((-9.0, -2.0, 0.0, 1.0, 2.0), losses, (-losses).exp())
    assert found.scale == 0
    assert not found.at_the_end


def test_it_prints_the_best_beside_the_papers_and_no_patch():
    losses = torch.tensor([[4.0, 0.5, 2.0]], dtype=torch.float64)
    text = repr(BestScale((-30.0, -2.0, 0.0), losses, (-losses).exp()))
    assert text.splitlines() == [
        "BestScale −2, of 3 tried on 1 prompt: RA added to the pattern",
        "     −30: loss 4, p(target) 0.0183   the paper's",
        "      −2: loss 0.5, p(target) 0.607   best",
        "       0: loss 2, p(target) 0.135   unpatched",
    ]
    both = repr(BestScale((-30.0, 0.0), losses[:, 1:], (-losses[:, 1:]).exp()))
    assert "best, the paper's" in both
    assert both.endswith("the best is the last tried: give scales= beyond it")
    none = repr(BestScale((0.0, 1.0), losses[:, 1:], losses[:, 1:], "pattern", "scores"))
    assert "unpatched" in none
    assert "the pattern added to the scores" in none


def test_it_is_a_table_too(shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    found = best_scale(model, ra, ALIKE, " w8", scales=[-1, 1], progress=False)
    frame = found.to_dataframe()
    assert frame["scale"].tolist() == [-1.0, 0.0, 1.0] * 2  # 0 is always there
    assert frame["prompt"].tolist() == [0] * 3 + [1] * 3
    assert frame["loss"].tolist() == found.loss_per_prompt.flatten().tolist()
    assert frame["probability"].tolist() == found.probability.flatten().tolist()


def test_what_is_tried_holds_the_papers_scales_and_finer_ones():
    assert set(PAPER_SCALES) < set(SCALES)
    assert list(SCALES) == sorted(set(SCALES))
    assert min(abs(scale) for scale in SCALES if scale) == 0.01


def test_prompts_are_read_in_every_form(shared):
    model = shared("gpt2", KINDS[0])
    tokens = model.to_tokens(ALIKE)
    _, ra = run_with_ra(model, tokens, target=8)
    wanted = best_scale(model, ra, tokens, 8, scales=[-3], progress=False).losses.tolist()
    assert len(set(wanted)) == 2
    for prompts in (ALIKE, tokens.tolist(), {"input_ids": tokens}):
        for targets in (" w8", [8, 8], answer_nll(" w8"), sequence_nll([[8], [8]])):
            if getattr(targets, "kind", None) == "sequence_nll":
                continue  # it appends the answer, and the map is of the prompts alone
            found = best_scale(model, ra, prompts, targets, scales=[-3], progress=False)
            assert found.losses.tolist() == pytest.approx(wanted, rel=1e-6)
    padded = torch.cat([tokens, torch.zeros_like(tokens)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], dim=1)
    found = best_scale(model, ra, padded, 8, scales=[-3], attention_mask=mask, progress=False)
    assert found.losses.tolist() == pytest.approx(wanted, rel=1e-6)
    alone = ra.apply_slice_to_batch_dim(1)
    one = best_scale(model, alone, ALIKE[1], " w8", scales=[-3], progress=False)
    every = best_scale(model, ra, ALIKE, " w8", scales=[-3], progress=False)
    torch.testing.assert_close(one.loss_per_prompt, every.loss_per_prompt[1:])


def test_an_encoder_decoder_is_read_with_its_target(close, tmp_path):
    model = arch_models.load_bridge("bart", tmp_path)
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    _, ra = run_with_ra(model, ids, target=12)
    found = best_scale(model, ra, ids, 12, scales=[-5.0], progress=False)
    for i in range(2):
        one = ra.apply_slice_to_batch_dim([i])
        for scale in (-5.0, 0.0):
            hooks = one.mean().patch_hooks(scale=scale)
            _, patched = run_with_ra(model, ids[i : i + 1], target=12, fwd_hooks=hooks)
            close(found.of_prompts(i).loss_at(scale), float(patched.loss[0]))


MISTAKES = [
    ({"targets": None}, BadInput, "a loss of the kind 'top_prediction'"),
    ({"targets": logit_diff(" w8", " w9")}, BadInput, "a loss of the kind 'logit_diff'"),
    ({"maps": "mean"}, BadInput, "found maps of type str. Give ra.mean"),
    ({"prompts": PROMPTS[:1]}, BadInput, "found 1 prompts for a cache of 2"),
    ({"scales": "best"}, BadInput, "found scales='best'; give a number, or several"),
    ({"scales": [math.inf]}, BadInput, "give a finite number"),
    ({"kind": "qk"}, NotStored, "found kind 'qk'"),
    ({"at": "z"}, BadInput, "found at='z'; give 'pattern' or 'scores'"),
    ({"at": "scores", "renormalise": True}, BadInput, "Leave renormalise out"),
    ({"batch_size": 0}, BadInput, "found batch_size=0"),
    ({"decoder_input": "w5"}, BadInput, "has no decoder beside its encoder"),
    ({"prompts": ["w5 w7 w9", "w4 w6 w8"]}, BadInput, "found 4 tokens .* the map to add has 5"),
    ({"heads": ["L9H0"]}, BadInput, "L9H0"),
]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES)
def test_what_cannot_be_is_refused(options, error, message, shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    given = {"maps": ra, "prompts": ALIKE, "targets": " w8", "progress": False, **options}
    refused(partial(unchecked(best_scale), model), given, message, error=error)


def test_a_cache_of_a_mean_has_no_prompts_own_maps(shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8", store="mean")
    with pytest.raises(NotStored, match=r"store='mean', which keeps no .* Give ra.mean\(\)"):
        best_scale(model, ra, ALIKE, " w8", progress=False)
    assert best_scale(model, ra.mean(), ALIKE, " w8", scales=-3, progress=False).scales == (-3, 0)


def test_a_scale_is_a_number(shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    wanted = r"found scale='best'; a patch adds a number .*ra_lens.best_scale\(model, maps, "
    with pytest.raises(BadInput, match=wanted):
        unchecked(patch_hooks)({0: ra["ra", 0]}, ra.sites, scale="best")
    if unchecked(patch_hooks) is patch_hooks:  # which the types checked by the tests forestall
        with pytest.raises(BadInput, match=wanted):
            ra.mean().patch_hooks(scale="best")


@pytest.mark.skipif(not OBSERVE_ONLY & set(CASES), reason="no TransformerBridge here")
def test_the_scores_of_a_model_that_only_shows_its_pattern_are_out_of_reach(shared):
    model = shared(*sorted(OBSERVE_ONLY & set(CASES))[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    with pytest.raises(UnsupportedModel, match="observe-only"):
        best_scale(model, ra, ALIKE, " w8", at="scores", progress=False)


def test_nan_of_a_patched_model_is_no_best_scale_and_nan_before_is_refused(shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    hooks = [("blocks.0.hook_attn_out", lambda out, hook: out * math.nan)]
    with (
        model.hooks(fwd_hooks=hooks),
        pytest.raises(NothingToDifferentiate, match="contain NaN"),
    ):
        best_scale(model, ra, ALIKE, " w8", progress=False)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", nan_where_large)]):
        found = best_scale(model, ra, ALIKE, " w8", scales=[-1e4, -0.5], progress=False)
    assert found.loss_per_prompt[:, 0].isnan().all()
    assert not found.loss_per_prompt[:, 1:].isnan().any()
    assert found.scale in (-0.5, 0.0)


def nan_where_large(out, hook):
    large = out.abs().amax(dim=(1, 2)) > 50
    return out.masked_fill(large[:, None, None], math.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_the_model(kind, fresh):
    model = fresh("llama", kind)
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    before = snapshot(model)
    best_scale(model, ra, ALIKE, " w8", progress=False)
    best_scale(model, ra.mean(), ALIKE, " w8", at="scores", progress=False)
    with pytest.raises(BadInput):
        best_scale(model, ra, ["w5", "w6"], " w8", progress=False)
    hooks = [("blocks.2.hook_resid_pre", raises(Oops()))]
    with pytest.raises(Oops), model.hooks(fwd_hooks=hooks):
        best_scale(model, ra, ALIKE, " w8", progress=False)
    assert changes(before, snapshot(model)) == {}


def test_progress_is_shown_for_several_batches_only(shared, capsys):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, ALIKE, target=" w8")
    best_scale(model, ra, ALIKE, " w8", scales=-1)
    assert "Scales" in capsys.readouterr().err
    best_scale(model, ra, ALIKE, " w8", scales=-1, progress=False)
    best_scale(model, ra.mean(), ALIKE, " w8", scales=-1)
    assert capsys.readouterr().err == ""
