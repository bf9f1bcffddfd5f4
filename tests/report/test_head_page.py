"""One head on one page: its numbers are those of the cache, and what is lacking is said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arch_models import BRIDGE, has, load_bridge
from browser import Seen, opening
from made_caches import attending, knocked_out, make, with_vectors
from pages import HOSTILE, Page
from ra_lens import run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.report import write_head_page, write_report
from ra_lens.report.head_facts import head_facts
from ra_lens.report.head_page import said_of_missing
from ra_lens.report.latent_svg import MOST_SPACES
from ra_lens.vjp import WEIGHTS, weight_gradient
from ra_lens.vocabulary import read_vectors
from refused import refused
from tiny_models import CASES, KINDS, random_ids

PROMPT = "w5 w7 w9 w4 w6"
CASE = [
    pytest.param(*case, marks=() if case == CASES[0] else pytest.mark.every_model) for case in CASES
]


def run(model: Any, **options: Any) -> RACache:
    return run_with_ra(model, PROMPT, target=" w8", progress=False, **{"vectors": True, **options})[
        1
    ]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "head.html"


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind"), CASE)
def test_all_is_there_in_every_class(shared: Any, path: Path, arch: str, kind: Any) -> None:
    model = shared(arch, kind)
    ra = run(model)
    head = ra.top_heads(1)[0]
    found = head_facts(ra, model, head)
    assert not found.missing
    assert found.latent is not None and found.pulls and found.readings
    text = read(write_head_page(ra, model, head, path, command="ra-lens head x")).text
    for wanted in (
        f"Head {head.label} of", "Its maps", "Edges it matters for", "from (query) → to (key)",
        "Which queries and keys are moved", "What its vectors say in the vocabulary",
        "Its part in the gradient", "‖∂L/∂W_O‖", "Share of each token", "ra-lens head x",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "Not here" not in text


def test_edges_are_those_whose_loss_would_change_most() -> None:
    ra = attending()
    effects = knocked_out(ra, 2)[0, 1]
    found = head_facts(ra, None, (2, 1), top=4)
    assert found.left_out == ("<|end|>",)
    effects[:, 0] = 0  # the token in front, where heads rest
    order = np.argsort(-np.abs(effects), axis=None)[:4]
    cells = [divmod(int(i), effects.shape[1]) for i in order]
    assert [(cell.query, cell.key) for cell in found.edges] == cells
    for cell in found.edges:
        assert cell.knockout == pytest.approx(effects[cell.query, cell.key], rel=1e-3)
        assert cell.ra == pytest.approx(ra["ra", 2][0, 1, cell.query, cell.key].item(), rel=1e-5)
        a = ra["pattern", 2][0, 1, cell.query, cell.key].item()
        assert cell.pattern == pytest.approx(a, rel=1e-5)


def test_norms_and_ranks_are_those_among_all_heads(shared: Any) -> None:
    model = shared("llama", KINDS[-1])
    ra = run(model)
    every = {head: ra["ra", head[0]][0, head[1]].norm().item() for head in ra.sites.heads}
    for head, norm in list(every.items())[:5]:
        found = head_facts(ra, None, head)
        assert found.norm == pytest.approx(norm, rel=1e-5)
        assert (found.rank, found.among) == (1 + sum(n > norm for n in every.values()), len(every))
        assert found.share == pytest.approx(norm / sum(every.values()), rel=1e-5)
        for facts in found.weights:
            own = weight_gradient(ra, facts.weight, head)
            shares = [ra.sites[layer].kv_group(h) for layer, h in every]
            norms = {
                (layer, group if facts.weight in ("W_K", "W_V") else h): weight_gradient(
                    ra, facts.weight, (layer, h)
                ).matrix.norm()
                for (layer, h), group in zip(every, shares, strict=True)
            }
            size = own.matrix.norm()
            assert facts.norm == pytest.approx(size.item(), rel=1e-4)
            assert facts.among == len(norms)
            assert facts.rank == 1 + sum(bool(n > size * (1 + 1e-5)) for n in norms.values())
            first = torch.linalg.matrix_norm(own.matrix, 2) ** 2 / size**2
            assert facts.first == pytest.approx(first.item(), rel=1e-4)
            assert sum(facts.shares) == pytest.approx(1, rel=1e-4)
            assert facts.tokens == tuple(ra.str_tokens[0])
        assert [facts.weight for facts in found.weights] == list(WEIGHTS)


def test_pairs_have_their_product_and_angle(shared: Any, path: Path) -> None:
    model = shared("gpt2", KINDS[0])
    ra = run(model)
    head = ra.top_heads(1)[0]
    r = ra["ra", head.layer][0, head.head]
    text = read(write_head_page(ra, model, head, path, top=3)).text
    for place in r.abs().flatten().argsort(descending=True)[:3].tolist():
        query, key = divmod(place, r.shape[1])
        q = ra["query", head.layer][0, query, head.head]
        k = ra["key", head.layer][0, key, head.head]
        cosine = torch.nn.functional.cosine_similarity(q, k, dim=0)
        tokens = ra.str_tokens[0]
        row = (
            f"{tokens[query].strip()} ({query}) → {tokens[key].strip()} ({key}) "
            f"{r[query, key]:+.3g} {'together' if r[query, key] < 0 else 'apart'} "
            f"{q @ k:.4g} {cosine:.3f}"
        ).replace("-", "−")
        assert row in text


def test_the_words_are_those_of_the_strongest_pairs(shared: Any, path: Path) -> None:
    model = shared("gpt2", KINDS[0])
    ra = run(model)
    head = ra.top_heads(1)[0]
    found = head_facts(ra, model, head)
    r = ra["ra", head.layer][0, head.head]
    query, key = divmod(int(r.abs().argmax()), r.shape[1])
    wanted = read_vectors(ra, model, head, kinds=("z", "value"), target=" w8")
    of_query, of_key = wanted.at(query, "z"), wanted.at(key, "value")
    assert found.readings[0] == of_query
    assert of_key in found.readings
    text = read(write_head_page(ra, model, head, path)).text
    for one, name in ((of_query, "writes (z)"), (of_key, "tells who looks (v)")):
        near = " ".join(token.token.strip() for token in one.top)
        assert f"({one.position}) {name} {near}" in text
        assert one.rank is not None


def test_of_a_long_prompt_the_tables_are_whole_and_the_drawings_say_they_are_not(
    path: Path,
) -> None:
    words = ("<|end|>", *(f" w{i}" for i in range(30)))
    ra = with_vectors(make((words,)))
    found = head_facts(ra, None, (0, 0), max_tokens=5)
    assert found.latent is not None
    assert found.latent.queries.first == 26
    assert len(found.maps.tokens) == 31
    text = read(write_head_page(ra, None, (0, 0), path, max_tokens=5)).text
    assert "Drawn are the last 5 tokens of 31; tables are of all." in text


def test_shares_of_many_tokens_are_summed_up(shared: Any, path: Path) -> None:
    model = shared("gpt2", KINDS[0])
    prompt = " ".join(f"w{i}" for i in range(3, 18))
    _, ra = run_with_ra(model, prompt, target=" w8", vectors=True, progress=False)
    head = ra.top_heads(1)[0]
    text = read(write_head_page(ra, None, head, path)).text
    shares = [weight_gradient(ra, weight, head).shares for weight in WEIGHTS]
    most = torch.stack(shares).abs().amax(dim=0)
    rest = most.argsort(descending=True)[12:]
    sums = [f"{100 * one[rest].sum():.1f} %".replace("-", "−") for one in shares]
    assert f"{len(rest)} other tokens together {' '.join(sums)}" in text


# ---- what is lacking ----------------------------------------------------------------------------


def test_without_vectors_it_has_maps_and_edges_and_says_what_it_lacks(
    shared: Any, path: Path
) -> None:
    model = shared("gpt2", KINDS[0])
    text = read(write_head_page(run(model, vectors=False), model, "L1H2", path)).text
    assert "Edges it matters for" in text
    assert (
        "Not here: latent space, pulls, gradient of W_Q, gradient of W_K, gradient of W_V, "
        "gradient of W_O, vocabulary: the run kept no vectors; run_with_ra(..., vectors=True) "
        "keeps them." in text
    )
    assert "Which queries and keys are moved" not in text


def test_what_an_attention_does_not_have_is_said_in_one_line(shared: Any, path: Path) -> None:
    model = shared("gpt2", KINDS[0])
    ra = run(model, vectors=["query", "key", "z", "attn_out_grad"])
    found = head_facts(ra, model, (1, 2))
    lines = said_of_missing(found)
    assert len(lines) == 1
    assert lines[0].startswith("gradient of W_Q, gradient of W_K, gradient of W_V, z_step in the ")
    assert lines[0].endswith(
        ": the attention of layer 1 has no such vectors, or the run did not keep them."
    )
    assert [one.weight for one in found.weights] == ["W_O"]
    assert found.latent is not None
    assert "Not here: gradient of W_Q" in read(write_head_page(ra, model, (1, 2), path)).text


@pytest.mark.every_model
@pytest.mark.skipif(BRIDGE not in KINDS, reason="needs TransformerBridge")
def test_latent_attention_has_no_projections_and_the_page_says_so(tmp_path: Path) -> None:
    if not has("deepseek_v3"):
        pytest.skip("this transformers has no DeepSeek V3")
    model = load_bridge("deepseek_v3", tmp_path)
    _, ra = run_with_ra(model, random_ids(1, 7), target=5, vectors=True, progress=False)
    head = ra.top_heads(1)[0]
    found = head_facts(ra, model, head)
    assert [one.weight for one in found.weights] == ["W_O"]
    assert found.latent is not None and found.pulls
    assert {one.kind for one in found.readings} <= {"z", "z_step"}
    lines = said_of_missing(found)
    assert any(
        line.startswith(
            "gradient of W_Q, gradient of W_K, gradient of W_V, query in the vocabulary"
        )
        and line.endswith(f"layer {head.layer} has no such vectors, or the run did not keep them.")
        for line in lines
    )
    assert any("value in the vocabulary" in line and "is not A·v" in line for line in lines)
    text = read(write_head_page(ra, model, head, tmp_path / "head.html")).text
    assert text.count("Not here:") == len(lines) == 2


def test_a_gradient_of_zero_is_told(path: Path) -> None:
    ra = with_vectors(make(scale=0.0))
    text = read(write_head_page(ra, None, (0, 0), path)).text
    assert "The gradient is 0 at every edge." in text
    assert "0, rank 1 of 6; 0.0% of all norms" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top": 0}, "top"), ({"example": 2}, "example=2"), ({"max_tokens": 0}, "max_tokens")],
)
def test_mistakes_are_named(path: Path, options: dict[str, Any], message: str) -> None:
    ra = with_vectors(make())
    refused(lambda: write_head_page(ra, None, (0, 0), path, **options), {}, message)
    assert not path.exists()


def test_a_head_or_maps_that_are_not_there_are_refused(shared: Any, path: Path) -> None:
    with pytest.raises(BadInput, match="layer=1, head=0"):
        write_head_page(make(), None, (1, 0), path)
    ra = run(shared("gpt2", KINDS[0]), store="norms")
    with pytest.raises(NotStored, match="store='norms'"):
        write_head_page(ra, None, (1, 0), path)
    with pytest.raises(BadInput, match=r"\.html"):
        write_head_page(make(), None, (0, 0), path.with_suffix(".txt"))
    assert not path.exists()


def test_tokens_stay_text(path: Path) -> None:
    ra = with_vectors(make((HOSTILE,)))
    ra.info = replace(ra.info, targets=(HOSTILE[0],))
    page = read(write_head_page(ra, None, (2, 1), path))
    assert not [attrs for tag, attrs in page.tags if tag == "script" and "src" in attrs]
    assert not any(script.strip().startswith("alert") for script in page.scripts)
    assert "<script>alert(1)" in page.text


# ---- in the report ------------------------------------------------------------------------------


def spaces(page: Page) -> list[str]:
    return [str(attrs["data-latent"]) for _, attrs in page.tags if "data-latent" in attrs]


def test_a_report_draws_the_first_heads_where_there_are_vectors(path: Path) -> None:
    ra = with_vectors(make())
    first = [f"{head.layer}.{head.head}" for head in ra.top_heads(2)]
    page = read(write_report(ra, path, top=2))
    assert spaces(page) == [f"{example}.{head}" for example in (0, 1) for head in first]
    assert "the 2 heads with the largest norms" in page.text
    markers = [tag for tag, attrs in page.tags if attrs.get("class") in ("query", "key")]
    assert markers.count("circle") == markers.count("rect") == 2 * (5 + 3)
    assert "of the variance" in page.text


def test_a_report_without_vectors_is_as_it_was(path: Path) -> None:
    page = read(write_report(make(), path))
    assert spaces(page) == []
    assert "two dimensions" not in page.text
    text = path.read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "latent" not in text  # nor its style and script


def test_of_many_prompts_fewer_heads_are_drawn(path: Path) -> None:
    ra = with_vectors(make(tuple(("<|end|>", " a", " b") for _ in range(MOST_SPACES // 2 + 1))))
    page = read(write_report(ra, path))
    assert len(spaces(page)) == MOST_SPACES // 2 + 1  # one of each
    assert "Drawn for the head with the largest norms." in page.text


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def see(browser: Any) -> Iterator[Callable[..., Seen]]:
    with opening(browser) as get:
        yield get


BOXES = """texts => texts.map(t => { const b = t.getBoundingClientRect();
  return [t.textContent, b.left, b.top, b.right, b.bottom] })"""


def apart(boxes: list[Any]) -> None:
    for (name, *one), (other_name, *other) in combinations(boxes, 2):
        beside = one[2] <= other[0] + 1 or other[2] <= one[0] + 1
        # A line of text is taller than its letters.
        below = one[3] <= other[1] + 4 or other[3] <= one[1] + 4
        assert beside or below, (name, other_name)


@pytest.mark.every_model
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_silent_and_no_wider_than_its_window(
    see: Callable[..., Seen], shared: Any, path: Path, width: int
) -> None:
    model = shared("llama", KINDS[-1])
    ra = run(model)
    write_head_page(ra, model, ra.top_heads(1)[0], path)
    page = see(path, viewport={"width": width, "height": 800}).page
    page.wait_for_function("document.querySelectorAll('.main-svg .hm, .scatterlayer').length >= 5")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    space = page.locator(".js-plotly-plot").last
    boxes = space.locator(".annotation-text").evaluate_all(BOXES)
    named = [box for box in boxes if box[0]]
    assert len(named) == 12  # queries and keys
    apart(named)
    assert space.locator(".annotation-arrow-g").count() >= 2


@pytest.mark.every_model
def test_labels_of_an_ordinary_prompt_do_not_lie_on_each_other(
    see: Callable[..., Seen], path: Path
) -> None:
    words = ("<s>", "שלום", "\n", *(f" word{i}" for i in range(12)))
    ra = with_vectors(make((words,)), d_head=16)
    for layer in ra.layers:
        ra["query", layer][..., 0] += 4
        ra["key", layer][..., 0] -= 4
    write_head_page(ra, None, (2, 1), path)
    page = see(path, viewport={"width": 1280, "height": 800}).page
    page.wait_for_selector(".annotation-text")
    boxes = page.locator(".js-plotly-plot").last.locator(".annotation-text").evaluate_all(BOXES)
    named = [box for box in boxes if box[0]]
    assert len(named) == 30
    apart(named)


@pytest.mark.every_model
def test_a_report_shows_the_space_of_the_head_that_is_chosen(
    see: Callable[..., Seen], path: Path
) -> None:
    ra = with_vectors(make())
    first, second, third, *_ = ra.top_heads(6)
    page = see(write_report(ra, path, top=2)).page
    page.wait_for_selector("#ra-grid [aria-selected=true]")
    for example in (0, 1):
        page.select_option("#ra-example", str(example))
        for head in (first, second, third):
            page.click(f"[data-head='{head.layer}.{head.head}']")
            shown = page.locator("[data-latent]:not([hidden])")
            drawn = head is not third
            assert shown.count() == int(drawn)
            assert page.locator("#ra-latent-none").is_hidden() == drawn
            if drawn:
                name = shown.get_attribute("data-latent")
                assert name == f"{example}.{head.layer}.{head.head}"
                texts = shown.locator("text").evaluate_all(BOXES)
                apart(texts)
                assert re.search(head.label, str(shown.locator("svg").get_attribute("aria-label")))
