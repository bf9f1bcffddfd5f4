"""A model whose layers have 2, 6 and 4 heads: scores by hand, and no head that is not there."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from arch_models import has, open_model, write
from conformance.pieces import D_HEAD
from oracle import HFHeads, Oracle
from ra_lens import perturbation_test, rank_heads, run_with_ra
from ra_lens.cli import show
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.experiments import patching_sweep, rank_tasks
from ra_lens.figures import head_grid, head_map
from ra_lens.heads import HeadScores, ranking_methods
from ra_lens.model import as_lens, available_kinds, load_folder
from ra_lens.model.sites import every_head, head_places, spell_counts, table
from ra_lens.patching.masking import mask_heads, mask_hooks
from ra_lens.paths import trace_layers
from ra_lens.report import write_report
from ra_lens.report.explorer import choose, explorer
from ra_lens.tasks import Pair, Task
from tiny_models import relative

KIND = "TransformerBridge"
if KIND not in available_kinds() or not has("laguna"):
    pytest.skip("no model whose layers have different numbers of heads", allow_module_level=True)

HEADS = (2, 6, 4)
EVERY = [(layer, head) for layer, n in enumerate(HEADS) for head in range(n)]
SCALE = D_HEAD**-0.5
OPTIONS = {"prepend_bos": False, "progress": False}
TASK = Task(
    name="toy",
    kind="icl",
    pairs=tuple(Pair(f"w{i}", f"w{i + 10}") for i in range(3, 43)),
    before_subject="w54 ",
    after_subject=" w55",
    separator=" ",
)
# Two demonstrations can be shuffled in one way only.
PROMPTS = [TASK.sample(1, shots=shots, seed=shots)[0] for shots in (2, 0, 1)]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write("laguna", tmp_path_factory.mktemp("laguna"))


@pytest.fixture(scope="module")
def model(where: Any) -> Any:
    return load_folder(where, kind=KIND, device="cpu")


@pytest.fixture(scope="module")
def reference(where: Any) -> HFHeads:
    return HFHeads(where)


@pytest.fixture(scope="module")
def opened(where: Any) -> Oracle:
    return open_model("laguna", where)


def ids_of(prompt: Any) -> list[int]:
    return [int(word[1:]) for word in prompt.text.split()]


def answer_of(prompt: Any) -> int:
    return int(prompt.answer[2:])


ASKED = [(ids_of(prompt), answer_of(prompt)) for prompt in PROMPTS]


def laid_out(effect: Any) -> torch.Tensor:
    """effect(layer, head) of every head; NaN where there is none."""
    wanted = torch.full((3, 6), torch.nan, dtype=torch.float64)
    for layer, head in EVERY:
        wanted[layer, head] = effect(layer, head)
    return wanted


def same(found: HeadScores, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    real = ~wanted.isnan()
    assert torch.equal(~found.scores.isnan(), real)
    assert relative(found.scores[real], wanted[real]) < tolerance
    values = [float(wanted[head]) for head in found.order()]
    assert sorted(found.order()) == EVERY
    assert values == sorted(values, reverse=True)


# ---- scores -------------------------------------------------------------------------------------


def test_ra_and_fa_are_norms_of_hugging_faces_own_maps(model: Any, opened: Oracle) -> None:
    sums = {"ra": torch.zeros(3, 6).double(), "fa": torch.zeros(3, 6).double()}
    for prompt in PROMPTS:
        ids = torch.tensor([[*ids_of(prompt), answer_of(prompt)]])

        def loss(logits: torch.Tensor, token: int = answer_of(prompt)) -> torch.Tensor:
            return -logits[0, -2].log_softmax(-1)[token]

        gradients, patterns = opened.score_gradients(ids, loss)
        assert [g.shape[1] for g in gradients] == list(HEADS)
        for name, maps in (("ra", [SCALE * g for g in gradients]), ("fa", patterns)):
            for layer, value in enumerate(maps):
                norms = value[0].flatten(1).norm(dim=1)
                sums[name][layer, : HEADS[layer]] += norms.double() / len(PROMPTS)
    for name, total in sums.items():
        wanted = laid_out(lambda layer, head, total=total: total[layer, head])
        same(rank_heads(model, PROMPTS, method=name, **OPTIONS), wanted)


def test_fa_of_mean_is_the_norm_of_the_mean_pattern(model: Any, opened: Oracle) -> None:
    prompts = TASK.sample(3)
    rows = torch.tensor([[*ids_of(prompt), answer_of(prompt)] for prompt in prompts])
    _, patterns = opened.score_gradients(rows, lambda logits: logits.sum())
    norms = [pattern.mean(dim=0).flatten(1).norm(dim=1) for pattern in patterns]
    found = rank_heads(model, prompts, method="fa_of_mean", **OPTIONS)
    same(found, laid_out(lambda layer, head: norms[layer][head]))


def test_cm1_is_what_zeroed_rows_of_w_o_cost(model: Any, reference: HFHeads) -> None:
    found = rank_heads(model, PROMPTS, method="cm1", batch_size=5, **OPTIONS)
    same(found, laid_out(partial(reference.lost, ASKED)))


def test_cm1_last_zeroes_the_last_token_only(model: Any, reference: HFHeads) -> None:
    found = rank_heads(model, PROMPTS, method="cm1_last", **OPTIONS)
    same(found, laid_out(partial(reference.lost_at_the_end, ASKED)))


def test_cm2_puts_mean_heads_into_shuffled_labels(model: Any, reference: HFHeads) -> None:
    right, shuffled = [ids for ids, _ in ASKED], copy.deepcopy(ASKED)
    for (ids, _), prompt in zip(shuffled, PROMPTS, strict=True):
        if len(prompt.demonstrations) == 2:  # w54 x w55 y w54 x w55 y …
            ids[3], ids[7] = ids[7], ids[3]
    found = rank_heads(model, PROMPTS, method="cm2", **OPTIONS)
    same(found, laid_out(partial(reference.gained, shuffled, right)))


def test_orders_that_know_nothing_have_every_head_once(model: Any) -> None:
    index = rank_heads(model, [], method="index")
    assert index.order() == EVERY
    assert index.reversed().order() == EVERY[::-1]
    same(index, laid_out(lambda layer, head: 11 - EVERY.index((layer, head))))
    drawn = rank_heads(model, [], method="random")
    # The numbers written down in test_heads_registry.py, one for each head that there is.
    first = [0.052567653572330175, 0.7030536087834104, 0.013836617704328869]
    assert [float(drawn.scores[head]) for head in EVERY[:3]] == first
    same(drawn, drawn.scores)


@pytest.mark.parametrize("name", ranking_methods())
def test_no_method_lists_a_head_that_is_not_there(model: Any, name: str) -> None:
    if name in ("relp", "gim"):  # its gates are no rule of theirs
        with pytest.raises(UnsupportedModel, match="product of two that depend on the input"):
            rank_heads(model, TASK.sample(2), method=name, **OPTIONS)
        return
    scores = rank_heads(model, TASK.sample(2), method=name, **OPTIONS)
    for one in (scores, scores.reversed()):
        labels = [f"L{layer}H{head}" for layer, head in EVERY]
        assert len(one) == len(one.top(100)) == 12
        assert sorted(head.label for head in one.top(100)) == sorted(labels)
        assert one.labels == labels
        frame = one.to_dataframe()
        assert sorted(frame["label"]) == sorted(labels)
        assert not frame["score"].isna().any()
        assert frame["rank"].tolist() == list(range(1, 13))
        for n in (0, 5, 12):
            kept = one.keep_mask(n)
            assert [(i, h) for i, h in kept.nonzero().tolist()] == sorted(one.order()[:n])
    assert "layers 0…2, 2 to 6 heads" in repr(scores)


# ---- what is done with them ---------------------------------------------------------------------


def test_masks_are_as_wide_as_the_widest_layer(model: Any, reference: HFHeads) -> None:
    ids = torch.tensor([ids_of(PROMPTS[0])])
    for heads in ([(0, 1)], [(1, 5), (2, 3)], [(0, 0), (1, 2), (2, 0)]):
        with reference.zeroed(heads):
            wanted = reference.logits(ids)
        keep = torch.ones(3, 6, dtype=torch.bool)
        for head in heads:
            keep[head] = False
        for hooks in (mask_hooks(as_lens(model).sites, keep), mask_heads(model, heads)):
            with torch.no_grad():
                found = model.run_with_hooks(ids, fwd_hooks=hooks)
            assert relative(found, wanted) < 1e-5
    with pytest.raises(BadInput, match=r"3 layers of 6 heads. Give \[layer, head\] = \[3, 6\]"):
        mask_hooks(as_lens(model).sites, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(BadInput, match="head L0H2, but layer 0 has heads 0 to 1"):
        mask_heads(model, "L0H2")


def test_the_perturbation_test_unmasks_the_heads_that_there_are(
    model: Any, reference: HFHeads
) -> None:
    frame = perturbation_test(
        model, TASK, methods="random", random_orders=1, shots=0, step=0.25, n_rank=1, n_test=5,
        **OPTIONS,
    )  # fmt: skip
    order = rank_heads(model, [], method="random").order()
    assert frame["heads_kept"].tolist() == [0, 3, 6, 9, 12]
    for _, row in frame.iterrows():
        differences = []
        with reference.zeroed(order[int(row["heads_kept"]) :]):
            for prompt in TASK.split().prompts("test", n=5):
                ids, token = ids_of(prompt), answer_of(prompt)
                logits = reference.logits(torch.tensor([ids]))[0, -1].double()
                others = torch.cat([logits[:token], logits[token + 1 :]])
                differences.append(float(logits[token] - others.max()))
        assert row["logit_diff"] == pytest.approx(sum(differences) / 5, rel=1e-4, abs=1e-5)


def test_tables_have_the_heads_that_there_are(model: Any, tmp_path: Any) -> None:
    options = {"methods": ["fa", "index"], "shots": 0, "n_rank": 2, **OPTIONS}
    frame = rank_tasks(model, TASK, out=tmp_path / "ranking.csv", **options)
    for _, part in frame.groupby("method"):
        assert sorted(zip(part["layer"], part["head"], strict=True)) == EVERY
        assert not part["score"].isna().any()
    again = rank_tasks(model, TASK, out=tmp_path / "ranking.csv", **options)
    assert again["label"].tolist() == frame["label"].tolist()


def test_maps_are_added_to_the_heads_that_there_are(model: Any, opened: Oracle) -> None:
    learned, asked = TASK.sample(2), TASK.sample(4)[2:]
    ids = torch.tensor([ids_of(prompt) for prompt in learned])
    _, ra = run_with_ra(model, ids, target=[answer_of(prompt) for prompt in learned])
    deltas = {layer: -3.0 * ra["ra", layer].mean(dim=0) for layer in range(3)}
    rows = torch.tensor([ids_of(prompt) for prompt in asked])
    wanted = opened.logits(rows, pattern_deltas=deltas)
    hooks = ra.mean().patch_hooks(scale=-3.0)
    with torch.no_grad():
        found = model.run_with_hooks(rows, fwd_hooks=hooks)
    assert relative(found, wanted) < 1e-5
    assert relative(found, opened.logits(rows)) > 1e-3
    swept = patching_sweep(
        model, TASK, scales=[-3.0], kinds=["ra"], shots=0, n_mean=2, n_test=3, at_least=5, **OPTIONS
    )
    assert not swept["logit_diff"].isna().any()


def test_a_cache_has_the_norms_of_the_heads_that_there_are(model: Any, tmp_path: Any) -> None:
    texts = [prompt.text for prompt in PROMPTS]
    _, ra = run_with_ra(model, texts, target=5, progress=False)
    norms = ra.norms()
    for layer, n in enumerate(HEADS):
        assert torch.equal(norms[:, layer, :n], ra["ra", layer].flatten(2).norm(dim=-1))
        assert norms[:, layer, n:].isnan().all()
    top = ra.top_heads(100)
    assert sorted((head.layer, head.head) for head in top) == EVERY
    assert [head.score for head in top] == sorted((head.score for head in top), reverse=True)
    frame = ra.to_dataframe()
    assert list(zip(frame["prompt"], frame["layer"], frame["head"], strict=True)) == [
        (prompt, *head) for prompt in range(3) for head in EVERY
    ]
    assert frame["ra_norm"].tolist() == norms[:, head_places(HEADS)].flatten().tolist()
    assert "2 to 6 heads" in repr(ra)
    assert ra.kv_group("L1H5") == ra.kv_group((2, 2)) == ra.kv_group("L0H1") == 1
    assert ra.kv_group("L1H2") == 0
    with pytest.raises(BadInput, match=r"layers of this model differ in their heads.*'L0H1'"):
        ra.kv_group(1)
    with pytest.raises(BadInput, match=r"head=2\); this cache has layers .* with heads 0 to 1"):
        head_map(ra, "L0H2")
    page = write_report(ra, tmp_path / "ragged.html", top=12).read_text(encoding="utf-8")
    assert "L1H5" in page
    assert "2 to 6 heads each" in page
    facts = show.as_json(ra, model, texts, top=100)
    assert facts["model"]["n_heads"] == [2, 6, 4]
    assert len(facts["top_heads"]) == 12
    for entry, row in zip(facts["prompts"], norms, strict=True):
        cell = entry["strongest_cells"][0]
        assert row[cell["layer"], cell["head"]] == row.nan_to_num(-1).max()
    traced = trace_layers(ra, example=0, follow="abs", target_pos=-1)
    assert set(traced.heads(5)) <= set(EVERY)


def test_the_report_holds_no_head_that_is_not_there(model: Any) -> None:
    _, ra = run_with_ra(model, PROMPTS[0].text, target=5)
    shown = choose(ra, [0], max_tokens=10, max_bytes=10**6)
    assert len(shown.mapped) == len(shown.heads) == 12
    written = explorer(ra, shown, sign="descent", top=3, patched=())
    data = written.split('id="ra-data">')[1].split("</script>")[0]
    held = json.loads(data)
    assert [len(row) for row in held["norms"]] == list(HEADS)
    assert [len(row) for row in held["examples"][0]["attention"]] == list(HEADS)
    assert held["heads"] == 6


@pytest.mark.parametrize("order", ["index", "score"])
def test_the_grid_frames_and_counts_heads_only(model: Any, order: Any) -> None:
    scores = rank_heads(model, PROMPTS, method="cm1", **OPTIONS)
    _, ra = run_with_ra(model, PROMPTS[0].text, target=5)
    for shown, values in ((scores, scores.scores.numpy()), (ra, ra.norms()[0].numpy())):
        figure = head_grid(shown, order=order, top=4)
        heatmap = figure.data[0]
        z, ranks = np.asarray(heatmap.z, float), np.asarray(heatmap.customdata)[..., 0]
        wanted = values if order == "index" else -np.sort(-values, axis=1)  # NaN comes last
        np.testing.assert_allclose(z, wanted, rtol=1e-6)
        assert np.isnan(z).tolist() == [[head >= n for head in range(6)] for n in HEADS]
        assert sorted(ranks[~np.isnan(z)]) == list(range(1, 13))
        assert len(figure.layout.shapes) == 4
        assert [t for row in heatmap.text for t in row if t] == [
            str(rank) for row in ranks for rank in row if 0 < rank <= 4
        ]
        assert "of 12<extra>" in heatmap.hovertemplate


def test_scores_by_hand_are_in_no_order_where_there_is_no_head() -> None:
    nan = float("nan")
    scores = HeadScores(
        "mine", "m", torch.tensor([[2.0, 9.0], [5.0, 2.0]]), (1, 4), 3, "tiny", heads=(1, 2)
    )
    assert scores.order() == [(4, 0), (1, 0), (4, 1)]
    assert scores.reversed().order() == [(4, 1), (1, 0), (4, 0)]
    assert scores.labels == ["L1H0", "L4H0", "L4H1"]
    assert scores.scores[0].isnan().tolist() == [False, True]
    with pytest.raises(BadInput, match=r"gave NaN for 1 of 3 heads \(L4H1\)"):
        HeadScores(
            "mine", "m", torch.tensor([[2.0, 9.0], [5.0, nan]]), (1, 4), 3, "tiny", heads=(1, 2)
        )
    for heads in ((1, 1), (2,), (3, 2)):
        with pytest.raises(BadInput, match=r"found heads=.*number of heads of each layer"):
            HeadScores("mine", "m", torch.ones(2, 2), (1, 4), 3, "tiny", heads=heads)


def test_tables_are_laid_out_by_layer() -> None:
    laid = table([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])])
    assert laid.nan_to_num(0).tolist() == [[[1, 0], [3, 4]], [[2, 0], [5, 6]]]
    assert laid[:, head_places((1, 2))].tolist() == [[1, 3, 4], [2, 5, 6]]
    assert every_head((3, 7), (1, 2)) == [(3, 0), (7, 0), (7, 1)]
    assert (spell_counts((4, 4)), spell_counts((2, 6, 4))) == ("4", "2 to 6")
