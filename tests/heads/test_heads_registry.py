"""The registry of ranking methods: adding one's own, and what is refused."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch

from left_behind import changes, snapshot
from ra_lens import load_demo_model, load_task
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.figures.style import method_styles
from ra_lens.heads import (
    RankingContext,
    RankingMethod,
    rank_heads,
    ranking_method,
    ranking_methods,
    registry,
)
from ra_lens.tasks import Prompt
from refused import unchecked
from tiny_models import KINDS, N_HEADS, N_LAYERS

PROMPTS = [
    Prompt("w3 w4 w5", " w6", corrupted=Prompt("w3 w7 w5", " w8")),
    Prompt("w7 w8", " w9", corrupted=Prompt("w5 w8", " w3")),
]
BUILT_IN = [
    *["ra", "w_norm", "michel", "atp", "knockout", "grad_sam", "ag", "grad_norm"],
    *["relp", "gim", "nap", "nap_ig", "zero", "mean", "resample"],
    *["fa", "fa_of_mean", "cm1", "cm1_last", "cm2", "random", "index"],
]


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.fixture
def model(shared):
    return shared("gpt2", KINDS[0])


def test_the_built_in_methods_are_there():
    methods = ranking_methods()
    assert list(methods) == BUILT_IN
    assert all(isinstance(method, RankingMethod) for method in methods.values())
    assert {name for name, method in methods.items() if method.split == "valid"} == {"cm2"}
    assert {name for name, method in methods.items() if method.random} == {"random"}
    assert len({method.title for method in methods.values()}) == len(BUILT_IN)
    methods.clear()  # a copy
    assert list(ranking_methods()) == BUILT_IN


def test_the_command_line_lists_the_built_in_methods():
    from ra_lens.cli.options import MethodsOption

    _, option = typing.get_args(MethodsOption)
    listed = option.help.removeprefix("Ways to rank heads: ").partition(".")[0]
    assert listed.split() == BUILT_IN


def test_each_built_in_method_has_a_look_of_its_own():
    styles = method_styles(BUILT_IN)
    assert len({style.colour for style in styles.values()}) == len(BUILT_IN)
    assert len({style.symbol for style in styles.values()}) == len(BUILT_IN)
    own = method_styles(["mine"])["mine"]
    assert own.colour not in {style.colour for style in styles.values()}


def test_a_function_becomes_a_method(own, model):
    seen = []

    @ranking_method("mine", title="last head first", split="valid", random=True)
    def mine(context: RankingContext):
        seen.append(context)
        return torch.arange(context.shape[0] * context.shape[1]).reshape(context.shape)

    scores = rank_heads(model, PROMPTS, method="mine", seed=4, draw=2, batch_size=7)
    assert scores.order()[:2] == [(2, 3), (2, 2)]
    assert (scores.method, scores.title, scores.n_examples) == ("mine", "last head first", 2)
    assert (scores.seed, scores.draw, scores.scores.dtype) == (4, 2, torch.float64)
    assert ranking_methods()["mine"] == RankingMethod(
        "mine", "last head first", mine, "valid", True
    )
    (context,) = seen
    assert context.model is model
    assert context.prompts == tuple(PROMPTS)
    assert (context.seed, context.draw, context.batch_size) == (4, 2, 7)
    assert context.questions.answers == ((6,), (9,))
    assert context.shape == (N_LAYERS, N_HEADS)


def test_a_name_is_taken_once_unless_replaced(own, model):
    with pytest.raises(BadInput, match=r"already is a ranking method 'ra' \(norm.*replace=True"):
        ranking_method("ra")(lambda context: torch.zeros(context.shape))
    ranking_method("ra", replace=True)(lambda context: torch.zeros(context.shape))
    assert rank_heads(model, PROMPTS).scores.abs().max() == 0
    assert list(ranking_methods()) == BUILT_IN
    assert ranking_methods()["ra"].title == "ra"
    with pytest.raises(BadInput, match="empty name"):
        ranking_method("")
    with pytest.raises(BadInput, match=r"split='test' for method 'm'; give 'train' or 'valid'"):
        unchecked(ranking_method)("m", split="test")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(N_HEADS, N_LAYERS), r"'bad' gave scores of shape \(4, 3\).*= \[3, 4\]"),
        (torch.zeros(N_LAYERS), r"'bad' gave scores of shape \(3,\)"),
        ([[0.0] * 4] * 3, r"'bad' gave a list; a tensor \[layer, head\] = \[3, 4\] is needed"),
        (None, "'bad' gave a NoneType"),
        (torch.full((3, 4), torch.nan), r"'bad' gave NaN for 12 of 12 heads \(L0H0, L0H1, .*…\)"),
    ],
)
def test_scores_that_cannot_be_used_name_their_method(result, message, own, model):
    ranking_method("bad")(lambda context: result)
    with pytest.raises(BadInput, match=message):
        rank_heads(model, PROMPTS, method="bad")


def test_an_unknown_method_gets_close_names_and_the_list(model):
    needed = (
        r"no ranking method 'CM'. Did you mean 'cm.*'\? There are 'ra', .*'index'; add your own"
    )
    with pytest.raises(BadInput, match=needed):
        rank_heads(model, PROMPTS, method="CM")
    with pytest.raises(BadInput, match=r"no ranking method 'xyzzy'. There are 'ra'"):
        rank_heads(model, PROMPTS, method="xyzzy")
    for methods in (5, [1], ["ra", None], [["ra"]]):
        with pytest.raises(BadInput, match=r"found methods=.*; give the name of a ranking method"):
            unchecked(rank_heads)(model, PROMPTS, methods=methods)
    for answer_in_input in ("no", 1, None):
        with pytest.raises(BadInput, match=r"answer_in_input=.*; give True or False"):
            unchecked(rank_heads)(model, PROMPTS, answer_in_input=answer_in_input)


def test_prompts_and_options_that_cannot_be_used_say_what_is_needed(model):
    for prompts, found in (("w3 w4", "type str"), (["w3 w4"], r"prompts\[0\] is a str")):
        with pytest.raises(BadInput, match=found + r".*Prompt is needed.*load_task"):
            unchecked(rank_heads)(model, prompts)
    for method in BUILT_IN[:-2]:
        with pytest.raises(BadInput, match=r"empty list of prompts"):
            rank_heads(model, [], method=method)
        with pytest.raises(BadInput, match=r"prompt of 1[78] tokens"):
            long = [Prompt(" ".join([word] * 16), " w4") for word in ("w3", "w5")]
            rank_heads(model, [replace(long[0], corrupted=long[1])], method=method)
    with pytest.raises(BadInput, match="batch_size=0; give at least 1"):
        rank_heads(model, PROMPTS, batch_size=0)
    for name in ("seed", "draw"):
        with pytest.raises(BadInput, match=f"found {name}=-1; give at least 0"):
            rank_heads(model, PROMPTS, method="random", **{name: -1})
    with pytest.raises(UnsupportedModel, match="HookedTransformer or TransformerBridge"):
        rank_heads(torch.nn.Linear(1, 1), PROMPTS)


def test_scores_of_each_prompt_are_kept_where_that_is_asked_for(own, model):
    without = {"fa_of_mean", "random", "index"}
    pair = [replace(PROMPTS[1], text=words, answer=" w4") for words in ("w7 w8", "w3 w9")]
    methods = [name for name in BUILT_IN if name not in without]
    found = rank_heads(model, pair, methods=methods, each_prompt=True, prepend_bos=False)
    plain = rank_heads(model, pair, methods=methods, prepend_bos=False)
    for name, scores in found.items():
        assert scores.each.shape == (2, N_LAYERS, N_HEADS)
        assert torch.equal(scores.each.mean(dim=0), scores.scores)
        assert torch.equal(plain[name].scores, scores.scores) and plain[name].each is None
        if name not in ("mean", "cm2"):  # those of one prompt hang on the others
            alone = rank_heads(model, pair[:1], method=name, prepend_bos=False)
            assert torch.allclose(alone.scores, scores.each[0], atol=1e-5), name
    for name in without:
        needed = rf"each_prompt=True with method '{name}' .*no score for a single prompt"
        with pytest.raises(BadInput, match=needed):
            rank_heads(model, pair, method=name, each_prompt=True)
    # A method of one's own gives either.
    ranking_method("mine")(
        lambda context: torch.ones(2, *context.shape) * torch.arange(24.0).view(2, 3, 4)
    )
    assert rank_heads(model, pair, method="mine").order()[0] == (2, 3)
    assert rank_heads(model, pair, method="mine", each_prompt=True).each[1, 0, 0] == 12


def test_every_built_in_method_says_what_it_costs():
    cost = {name: method.passes for name, method in ranking_methods().items()}
    of_ten = {name: (one.forwards(10), one.backward) for name, one in cost.items()}
    once = dict.fromkeys(BUILT_IN[:10], (1, 1))
    assert of_ten == once | {
        **{"nap": (2, 1), "nap_ig": (6, 5)},
        **{"zero": (11, 0), "mean": (12, 0), "resample": (12, 0)},
        **{"fa": (1, 0), "fa_of_mean": (1, 0), "random": (0, 0), "index": (0, 0)},
        **{"cm1": (11, 0), "cm1_last": (11, 0), "cm2": (12, 0)},
    }


def test_random_orders_are_those_written_down_and_touch_no_generator(model):
    before = torch.get_rng_state()
    scores = rank_heads(model, [], method="random")
    assert torch.equal(torch.get_rng_state(), before)
    # Python's generator for the text "ra_lens random order 0 0": the same everywhere.
    first = [0.052567653572330175, 0.7030536087834104, 0.013836617704328869]
    assert scores.scores[0, :3].tolist() == first
    torch.manual_seed(5)
    assert torch.equal(rank_heads(model, PROMPTS, method="random").scores, scores.scores)
    orders = {
        tuple(rank_heads(model, [], method="random", seed=seed, draw=draw).order())
        for seed in range(3)
        for draw in range(20)
    }
    assert len(orders) == 60


def test_index_is_first_layer_first_head_first(model):
    scores = rank_heads(model, [], method="index")
    every = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    assert scores.order() == every
    assert scores.reversed().order() == every[::-1]


def test_no_two_methods_give_the_same_order_on_the_embedded_model():
    # With examples it is sure of its answers: then 1 − p is −log p, and so is CM1 zeroing.
    model, prompts = load_demo_model(), load_task("antonym").sample(4)
    found = rank_heads(model, prompts, methods=list(ranking_methods()), progress=False)
    orders = {name: tuple(scores.order()) for name, scores in found.items()}
    orders |= {f"{name} reversed": tuple(s.reversed().order()) for name, s in found.items()}
    orders["another draw"] = tuple(rank_heads(model, [], method="random", draw=1).order())
    assert len(set(orders.values())) == len(orders) == 2 * len(BUILT_IN) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_leaves_nothing_on_the_model(kind, fresh):
    model = fresh("opt", kind)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))  # a bridge attaches hooks of its own in its first run
    twin = Prompt("w6 w4 w9", " w3")
    prompts = [Prompt(words, " w6", corrupted=twin) for words in ("w3 w4 w5", "w7 w8 w9")]
    before = snapshot(model)
    for name in BUILT_IN:
        rank_heads(model, prompts, method=name, progress=False)
        assert not changes(before, snapshot(model)), name


def test_a_progress_bar_counts_rows_where_there_are_several_batches(model, capsys):
    rank_heads(model, PROMPTS, method="cm1", batch_size=10)
    shown = capsys.readouterr().err
    assert "Each head" in shown
    assert "/24 " in shown  # it goes when it is done
    rank_heads(model, PROMPTS, method="cm1", batch_size=10, progress=False)
    rank_heads(model, PROMPTS, method="cm1", batch_size=24)
    assert capsys.readouterr().err == ""
