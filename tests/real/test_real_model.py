"""A real language model, against Hugging Face's own in float64: its maps, and what edits do.

The prompt is that of the paper's Figures 1, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from oracle import HFHeads, Oracle, load_oracle, nll
from ra_lens import load_task, perturbation_test, rank_heads, run_with_ra
from ra_lens.report.head_facts import head_facts
from real_model import needs_real_model, real_folder, real_model
from tiny_models import KINDS, relative

pytestmark = [needs_real_model, pytest.mark.parametrize("kind", KINDS)]

PROMPT = "I like Italy and France. I visited the city of"
PARIS, ROME = " Paris", " Rome"
N_HEADS, D_HEAD, SCALE = 9, 64, -1.0
STRONGEST = (23, 4)


@cache
def float64() -> Oracle:
    return load_oracle(real_folder())


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """Three models take gigabytes."""
    yield
    for function in (float64, collected, real_model):
        function.cache_clear()


@cache
def collected(kind: Any, target: str) -> Any:
    return run_with_ra(real_model(kind), PROMPT, target=target, prepend_bos=True)[1]


def token(kind: Any, text: str) -> int:
    return int(real_model(kind).to_single_token(text))


def ids_of(kind: Any) -> torch.Tensor:
    return real_model(kind).to_tokens(PROMPT)


def test_maps_are_those_of_autograd(kind):
    """R = dL/d(q·k) = dL/dS / √d_head, since S = q·k / √d_head."""
    layers = [0, 11, STRONGEST[0], 29]
    ra, ids = collected(kind, PARIS), ids_of(kind)
    wanted = float64().all_gradients(ids, nll(token(kind, PARIS)), layers)
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril()
    for layer in layers:
        of_scores, pattern, of_pattern = wanted[layer]
        at = f"blocks.{layer}.attn.hook_"
        pairs = [
            (ra[at + "ra"][0], of_scores[0] / D_HEAD**0.5),
            (ra[at + "pattern"][0], pattern[0]),
            (ra[at + "pattern_grad"][0] * seen, of_pattern[0] * seen),
        ]
        for found, exact in pairs:
            assert relative(found, exact) < 1e-4
            # A head alone may be a hundredth of its layer, and so is what float32 can say of it.
            for head in (0, STRONGEST[1], N_HEADS - 1):
                assert relative(found[head], exact[head]) < 1e-3


def test_the_head_of_the_figure_goes_where_the_answer_comes_from(kind):
    """Figure 7: more attention to the country of the target, less to the other one."""
    words = real_model(kind).to_str_tokens(PROMPT)
    france, italy = words.index(" France"), words.index(" Italy")
    best = collected(kind, PARIS).top_heads(1)[0]
    assert (best.layer, best.head) == STRONGEST
    layer, head = STRONGEST
    for target, more, less in ((PARIS, france, italy), (ROME, italy, france)):
        descent = -collected(kind, target)[f"blocks.{layer}.attn.hook_ra"][0, head, -1]
        assert descent[more] > 0 > descent[less]
        assert int(descent.argmax()) == more
        assert int(descent.argmin()) == less


def deltas(kind: Any, n: int) -> dict[int, torch.Tensor]:
    """What a patch adds to the pattern of each site, in a prompt of n tokens."""
    mean = collected(kind, PARIS)
    found: dict[int, torch.Tensor] = {}
    for layer in range(real_model(kind).cfg.n_layers):
        added = SCALE * mean[f"blocks.{layer}.attn.hook_ra"][0].double()
        found[layer] = torch.zeros(N_HEADS, n, n, dtype=torch.float64)
        found[layer][:, : added.shape[1], : added.shape[2]] = added
    return found


def test_a_patch_does_what_the_same_numbers_do_in_hugging_face(kind):
    model, ids = real_model(kind), ids_of(kind)
    hooks = collected(kind, PARIS).mean().patch_hooks(scale=SCALE)
    with torch.no_grad():
        found = model.run_with_hooks(ids, fwd_hooks=hooks)
        plain = model(ids)
    wanted = float64().logits(ids, pattern_deltas=deltas(kind, ids.shape[1]))
    assert relative(found, wanted) < 1e-4
    assert relative(plain, wanted) > 1e-2
    paris = token(kind, PARIS)
    assert found[0, -1].softmax(-1)[paris] > plain[0, -1].softmax(-1)[paris]


def test_text_under_a_patch_is_that_of_whole_forward_passes(kind):
    model, ids = real_model(kind), ids_of(kind)
    hooks = collected(kind, PARIS).mean().patch_hooks(scale=SCALE, align="left")
    wanted = ids
    for _ in range(3):
        logits = float64().logits(wanted, pattern_deltas=deltas(kind, wanted.shape[1]))
        wanted = torch.cat([wanted, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens", "verbose": False}
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        found = model.generate(ids, stop_at_eos=False, **options)
    assert torch.equal(found, wanted)


def test_accuracies_of_masked_heads_are_those_of_hugging_face(kind):
    """The first half of the heads kept: rows of W_O of the others are zeroed."""
    n, task = 4, load_task("singular-plural")
    options = {"methods": "index", "directions": ["forward"], "shots": 1, "n_test": n}
    options |= {"prepend_bos": True, "progress": False}
    table = perturbation_test(real_model(kind), task, step=0.5, **options)
    heads = HFHeads(real_folder())
    every = [(layer, head) for layer in range(heads.n_layers) for head in range(N_HEADS)]
    model = real_model(kind)
    asked = [
        (model.to_tokens(one.text), int(model.to_tokens(one.answer, prepend_bos=False)[0, 0]))
        for one in task.split().prompts("test", shots=1, n=n)
    ]
    kept = table["heads_kept"].tolist()
    assert kept == [0, len(every) // 2, len(every)]
    for k, row in zip(kept, table.to_dict("records"), strict=True):
        ranks, margins = [], []
        with heads.zeroed(every[k:]):
            for ids, answer in asked:
                logits = heads.logits(ids)[0, -1].double()
                best_other = torch.cat([logits[:answer], logits[answer + 1 :]]).max()
                ranks.append(int((logits > logits[answer]).sum()))
                margins.append(float(logits[answer] - best_other))
        for top in (1, 2, 3):
            assert row[f"top{top}"] == pytest.approx(sum(r < top for r in ranks) / n)
        assert row["logit_diff"] == pytest.approx(sum(margins) / n, rel=1e-3)
    assert table["top3"].max() > 0  # it answers something


def test_what_is_said_of_the_strongest_head_is_what_its_prompt_is_about(kind):
    """As known of the prompt: a token's value is its own word, and R moves the two countries."""
    model = real_model(kind)
    _, ra = run_with_ra(
        model, PROMPT, target=PARIS, prepend_bos=True, vectors=True, layers=[STRONGEST[0]]
    )
    found = head_facts(ra, model, STRONGEST)
    assert not found.missing
    moved = {pair.key_token: pair.together for pair in found.pulls if pair.query_token == " of"}
    assert (moved[" Italy"], moved[" France"]) == (False, True)
    values = {one.token: one.top for one in found.readings if one.kind == "value"}
    for country in (" Italy", " France"):
        assert country in [score.token for score in values[country]]
    assert found.latent is not None
    assert found.latent.shared_by == (3, 4, 5)
    # Queries and keys lie in cones of their own, which the first component tells apart.
    lowest = found.latent.queries.at[1:, 0].min()
    assert lowest > found.latent.keys.at[1:, 0].max()


def test_atp_is_the_slope_of_really_taking_a_little_of_heads_away(kind):
    """Rows of W_O are made half a percent smaller and larger in Hugging Face's model."""
    (prompt,) = load_task("present-past").split().prompts("train", shots=1, n=1)
    options = {"prepend_bos": "<|endoftext|>", "progress": False, "answer_in_input": False}
    model, heads = real_model(kind), HFHeads(real_folder())
    found = rank_heads(model, [prompt], methods=["atp", "michel"], **options)
    ids = model.to_tokens("<|endoftext|>" + prompt.text, prepend_bos=False)
    answer = int(model.to_tokens(prompt.answer, prepend_bos=False)[0, 0])

    def loss(layer: int, head: int, factor: float) -> float:
        weight, rows = heads.rows(layer, head)
        before = weight[rows].clone()
        weight[rows] = before * factor
        logits = heads.logits(ids).double()
        weight[rows] = before
        return float(nll(answer)(logits))

    chosen = [*found["atp"].order()[:3], *found["atp"].order()[-3:]]
    rises = [(loss(*head, 0.995) - loss(*head, 1.005)) / 0.01 for head in chosen]
    assert min(rises) < -0.05
    assert max(rises) > 0.05
    foretold = [float(found["atp"].scores[head]) for head in chosen]
    assert foretold == pytest.approx(rises, rel=0.02)
    assert [float(found["michel"].scores[head]) for head in chosen] == list(map(abs, foretold))
