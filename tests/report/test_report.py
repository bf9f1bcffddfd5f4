"""The report: one file, complete or absent, that loads nothing and runs nothing of the prompt's."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs

from made_caches import lower, make
from pages import EVIL, HOSTILE, Page, lower_triangles
from ra_lens import files as file_module
from ra_lens import run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.files import check_output
from ra_lens.head_maps import head_of_example
from ra_lens.model import Site, Sites
from ra_lens.report import (
    PatchedPrompt,
    Predictions,
    Section,
    Table,
    patched_predictions,
    write_report,
)
from ra_lens.report.explorer import pack
from ra_lens.report.prompt_tokens import prompt_tokens
from ra_lens.report.scale_curve import scale_svg
from ra_lens.run_info import RunInfo
from ra_lens.scales import SCALES, BestScale
from refused import unchecked
from tiny_models import KINDS


@pytest.fixture
def ra() -> RACache:
    return make()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_it_tells_the_run(ra: RACache, path: Path) -> None:
    section = Section("More", ("A paragraph.",), Table(("x",), (("y",),)), notes=("Small.",))
    assert write_report(ra, path, top=2, command="ra-lens run -p 'x'", sections=[section]) == path
    page = read(path)
    for wanted in (
        "Reversed Attention of toy", "Model toy", "0, 2; 3 heads each", "5, <|end|> prepended",
        "Target “·t”", "1.0000, −log p of the target; p(target) = 0.368", "p(target) = 0.135",
        "prompt 1 of 2", "means over 2 prompts", "A paragraph.", "Small.",
        "ra-lens run -p 'x'", "transformer-lens", "Red cells would get more attention",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    chips = [attrs["class"] for tag, attrs in page.tags if tag == "bdi" and "class" in attrs]
    first = ["token special", *["token"] * 4, "token target next"]
    assert chips == [*first, "token special", *["token"] * 2, "token target next"]


def test_it_holds_the_maps_of_every_head_and_prompt(ra: RACache, path: Path) -> None:
    write_report(ra, path)
    page = read(path)
    data, maps = page.data(), page.maps()
    assert len(maps) == 2 * len(ra.layers) * ra.n_heads
    for example, n in enumerate((5, 3)):
        for layer in ra.layers:
            for head in range(ra.n_heads):
                facts = data["examples"][example]["maps"][f"{layer}.{head}"]
                assert facts["rows"] == facts["columns"] == ["input", 0, n]
                r = ra["ra", layer][example, head, :n, :n]
                assert facts["limit"] == r.abs().max().item()
                a_found, r_found = lower_triangles(
                    maps[f"{example}.{layer}.{head}"], facts["limit"], n
                )
                wanted = lower(ra["pattern", layer][example, head, :n, :n])
                np.testing.assert_allclose(a_found, wanted, rtol=5e-4, atol=1e-7)
                np.testing.assert_allclose(r_found, lower(r), rtol=5e-4, atol=1e-6)
    norms = np.asarray(data["examples"][1]["norms"])
    np.testing.assert_allclose(norms, ra.norms()[1].numpy(), rtol=1e-4)
    np.testing.assert_allclose(data["norms"], ra.norms().mean(0).numpy(), rtol=1e-4)


def test_packed_maps_keep_three_digits_and_what_is_no_number() -> None:
    ra = make()
    r = ra["ra", 0][0, 0]
    r[4, :5] = torch.tensor([1e-3, -3e-8, torch.nan, 5e-6, -4e-4]) * 1e-9
    ra["ra", 0][0, 0] = r.tril() * (torch.arange(5) == 4)[:, None]
    maps = head_of_example(ra, (0, 0))
    a, found = lower_triangles(pack(maps), maps.limit, 5)
    np.testing.assert_allclose(a, maps.pattern, rtol=5e-4)
    np.testing.assert_allclose(found, maps.ra, rtol=5e-4, atol=3e-8 * maps.limit)
    assert maps.limit == pytest.approx(1e-12)
    assert np.isnan(found[4, 2])


def test_the_heads_with_the_largest_norms_are_kept_where_space_is_short(
    ra: RACache, path: Path
) -> None:
    size = 4 * (5 * 6 // 2 + 3 * 4 // 2) + 2 * (5 + 3)
    write_report(ra, path, max_megabytes=3 * size * 4 / 3 / 1e6)
    page = read(path)
    kept = {f"{i}.{s.layer}.{s.head}" for i in (0, 1) for s in ra.top_heads(3)}
    assert set(page.maps()) == kept
    assert "the maps of the 3 heads with the largest norms; the other 3" in page.text


def test_some_of_the_prompts_can_be_shown(ra: RACache, path: Path) -> None:
    write_report(ra, path, examples=[1])
    page = read(path)
    assert len(page.data()["examples"]) == 1
    assert "p(target) = 0.135" in page.text
    assert "p(target) = 0.368" not in page.text
    facts = page.data()["examples"][0]["maps"]["0.0"]
    assert facts["limit"] == ra["ra", 0][1, 0].abs().max().item()


def test_the_table_says_what_the_strongest_entries_are(ra: RACache, path: Path) -> None:
    write_report(ra, path, top=1)
    score = ra.top_heads(1)[0]
    values = ra["ra", score.layer][0, score.head]
    query, key = divmod(int(values.abs().argmax()), values.shape[-1])
    moves = "more" if values[query, key] < 0 else "less"
    text = read(path).text
    assert f"{score.label} {score.score:.4g}" in text
    assert re.search(rf"\({query}\) → \S+ \({key}\): {moves}", text)


@pytest.fixture
def hostile() -> RACache:
    ra = make((HOSTILE,))
    ra.info = replace(ra.info, targets=(EVIL,), model_name=EVIL)
    return ra


def test_hostile_text_stays_text(hostile: RACache, path: Path) -> None:
    figure = go.Figure(go.Heatmap(z=[[1.0]], x=[EVIL], y=["<!--<script>"]))
    section = Section(EVIL, (EVIL,), Table((EVIL,), ((EVIL,),)), ((EVIL, (figure,)),), (EVIL,))
    one = Predictions(((EVIL, 0.5), ("\ud800", 0.25)), 0.5, 1)
    patched = [PatchedPrompt(-30.0, one, one)]
    write_report(hostile, path, command=EVIL, sections=[section], patched=patched)
    text, page = path.read_text(encoding="utf-8"), read(path)
    calm = Predictions((("a", 0.5), ("b", 0.25)), 0.5, 1)
    write_report(
        make((tuple("abcdefghijk"),)),
        path,
        command="c",
        patched=[PatchedPrompt(-30.0, calm, calm)],
        sections=[Section("s", ("p",), Table(("c",), (("v",),)), (("h", (figure,)),), ("n",))],
    )
    plain = read(path)
    breaks = ("br", "wbr")  # a line ends where a token ends one
    names = [tag for tag, _ in page.tags if tag not in breaks]
    assert names == [tag for tag, _ in plain.tags if tag not in breaks]  # none is the text's
    assert text.replace(get_plotlyjs(), "").count("alert(1)<") == 0
    assert page.text.count(EVIL) >= 12
    for token in ("\"'`", "🙂", "שלום", "<!--", "%{y}", "&lt;", "U+202Eabc", "⏎", "]]>", "U+0000",
                  "“U+D800” 25.0 %"):  # fmt: skip
        assert token in page.text
    assert "\x00" not in text


def test_names_of_layers_cannot_end_the_data(ra: RACache, path: Path) -> None:
    """They come with a cache that somebody else has saved."""
    write_report(ra, path)
    plain = len(read(path).blocks())
    sites = Sites({i: replace(s, prefix=f"{EVIL}<!--{s.prefix}") for i, s in ra.sites.items()})
    saved = RACache(sites=sites, loss=ra.loss, info=ra.info)
    for layer in ra.layers:
        saved._put(layer, "ra", ra["ra", layer])
        saved._put(layer, "pattern", ra["pattern", layer])
    write_report(saved, path)
    page = read(path)
    assert [one["name"] for one in page.data()["layers"]] == [f"{EVIL}<!-- 0", f"{EVIL}<!-- 2"]
    assert len(page.blocks()) == plain


def test_it_loads_nothing_and_runs_only_its_own_script(ra: RACache, path: Path) -> None:
    write_report(ra, path)
    page = read(path)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "action"} & set(a)]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    scripts = [text for attrs, text in page.blocks() if not attrs]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == 1
    assert f"script-src 'sha256-{hashes[0]}';" in policy
    own = path.read_text(encoding="utf-8")
    assert "://" not in own
    assert "@import" not in own
    assert "url(" not in own
    assert "Plotly" not in own


def test_plotly_is_in_a_page_once_and_only_with_a_plotly_figure(ra: RACache, path: Path) -> None:
    figure = go.Figure(go.Scatter(y=[1]))
    write_report(ra, path, sections=[Section("s", figures=(("", (figure, figure)),))])
    page = read(path)
    assert page.scripts.count(get_plotlyjs()) == 1
    policy = next(str(a["content"]) for _, a in page.tags if "http-equiv" in a)
    for script in (text for attrs, text in page.blocks() if not attrs):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_size_for_a_small_model_is_small(path: Path) -> None:
    """12 layers of 12 heads on 64 tokens, as GPT-2 small has them."""
    n, heads = 64, 12
    generator = torch.Generator().manual_seed(0)
    tokens = tuple(f" w{i}" for i in range(n))
    ra = RACache(
        sites=Sites({i: Site(i, f"blocks.{i}.attn", heads, heads, 0.125) for i in range(12)}),
        info=RunInfo(str_tokens=(tokens,), starts=(0,)),
    )
    for layer in range(12):
        for kind in ("ra", "pattern"):
            maps = torch.rand(1, heads, n, n, generator=generator).tril()
            ra._put(layer, kind, maps if kind == "ra" else maps / maps.sum(dim=-1, keepdim=True))
    write_report(ra, path)
    assert path.stat().st_size < 1.8e6


def test_thousands_of_tokens_are_text_and_their_end_has_maps(path: Path) -> None:
    n = 2_000
    ra = RACache(
        sites=Sites({0: Site(0, "blocks.0.attn", 2, 2, 0.125)}),
        info=RunInfo(str_tokens=(tuple(f" w{i}" for i in range(n)),), starts=(0,)),
    )
    zero = torch.zeros(1).expand(1, 2, n, n)  # takes no memory
    for kind in ("ra", "pattern"):
        ra._put_norms(0, kind, torch.ones(1, 2, 1, 1))
        ra._keep(0, kind, zero)
    write_report(ra, path, max_tokens=40)
    page = read(path)
    assert sum(tag == "bdi" and "token" in str(a.get("class")) for tag, a in page.tags) == n
    assert page.data()["examples"][0]["maps"]["0.1"]["rows"] == ["input", 1960, 40]
    assert path.stat().st_size < 0.5e6


def test_it_fits_phones_and_both_themes_and_paper(ra: RACache, path: Path) -> None:
    write_report(ra, path)
    text = path.read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_answers_of_several_tokens_are_tokens_of_the_prompt(ra: RACache, path: Path) -> None:
    ra.info = replace(
        ra.info,
        objective="sequence_nll",
        targets=(" Paris<b>", ""),
        answer_lengths=(2, 0),
        str_tokens=(("<|end|>", " x", "\n", " Paris", "<b>"), ra.info.str_tokens[1]),
    )
    write_report(ra, path, top=1, examples=[0])
    page = read(path)
    chips = [attrs["class"] for tag, attrs in page.tags if tag == "bdi" and "class" in attrs]
    assert chips == ["token special", "token", "token", "token target", "token target"]
    assert "mean of −log p over the target's tokens" in page.text
    assert "p(target)" not in page.text


def test_an_answer_that_a_decoder_reads_takes_nothing_off_what_the_encoder_read() -> None:
    site = Site(0, "decoder_blocks.0.cross_attn", 2, 2, 0.5, cross=True)
    info = RunInfo(
        objective="sequence_nll",
        targets=(" t u",),
        str_tokens=(tuple("abc"),),
        decoder_tokens=(("<pad>", " t", " u"),),
        answer_lengths=(2,),
    )
    ra = RACache(sites=Sites({0: site}), info=info)
    encoder = [("a", ""), ("b", ""), ("c", "")]
    assert prompt_tokens(ra, 0) == [*encoder, ("·t·u", "target next")]
    assert prompt_tokens(ra, 0, "input", target=False) == encoder
    read = [("<pad>", ""), ("·t", "target"), ("·u", "target")]
    assert prompt_tokens(ra, 0, "decoder") == read


def test_the_same_cache_gives_the_same_file(ra: RACache, tmp_path: Path) -> None:
    first, second = (write_report(ra, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


# ---- predictions before and after ---------------------------------------------------------------


@pytest.mark.parametrize("target", [" w8", None])
def test_predictions_are_those_of_the_model_before_and_after(shared: Any, target: Any) -> None:
    model = shared("gpt2", KINDS[0])
    prompts = ["w5 w7 w9", "w4 w6 w8 w10"]
    _, ra = run_with_ra(model, prompts, target=target)
    found = patched_predictions(model, prompts, ra, target=target, scale=-3.0, top=3)
    for i, text in enumerate(prompts):
        tokens = model.to_tokens(text)
        n = tokens.shape[1]
        with torch.no_grad():
            before = model(tokens)[0, -1].softmax(-1)
            hooks = []
            for layer in ra.layers:
                added = -3.0 * ra["ra", layer][i, :, :n, :n]

                def add(pattern: Any, hook: Any, added: Any = added) -> Any:
                    return pattern + added

                hooks.append((f"blocks.{layer}.attn.hook_pattern", add))
            after = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].softmax(-1)
        wanted = int(before.argmax()) if target is None else int(model.to_tokens(target)[0, -1])
        for chances, one in ((before, found[i].before), (after, found[i].after)):
            assert one.target == pytest.approx(chances[wanted].item(), rel=1e-4)
            assert one.rank == 1 + int((chances > chances[wanted]).sum())
            values = chances.sort(descending=True).values[:3].tolist()
            assert [chance for _, chance in one.top] == pytest.approx(values, rel=1e-4)
        assert found[i].after.target > found[i].before.target  # a small step of descent


@pytest.mark.parametrize("at", ["pattern", "scores"])
def test_the_scale_is_the_best_for_each_prompt_where_none_is_given(shared: Any, at: Any) -> None:
    model = shared("gpt2", KINDS[0])
    prompts, targets = ["w5 w7", "w4 w6 w8"], [" w8", " w9"]
    _, ra = run_with_ra(model, prompts, target=targets)
    found = patched_predictions(model, prompts, ra, target=targets, at=at)
    scales = set[float]()
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        one = ra.apply_slice_to_batch_dim([i]).mean()
        losses: dict[float, float] = {}
        with torch.no_grad():
            for scale in SCALES:
                hooks = one.patch_hooks(scale=scale, at=at)
                logits = model.run_with_hooks(model.to_tokens(prompt), fwd_hooks=hooks)[0, -1]
                losses[scale] = -float(logits.log_softmax(-1)[model.to_single_token(target)])
        best = min(losses, key=lambda scale: losses[scale])
        assert (found[i].scale, found[i].at) == (best, at)
        assert found[i].after.target == pytest.approx(math.exp(-losses[best]), rel=1e-4)
        curve = found[i].found
        assert curve is not None
        assert curve.losses.tolist() == pytest.approx(list(losses.values()), rel=1e-4)
        scales.add(best)
    assert scales != {-30.0}


def test_a_given_scale_is_taken_and_no_other_tried(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, "w5 w7", target=" w8")
    one = patched_predictions(model, "w5 w7", ra, target=" w8", scale=-30.0)[0]
    with torch.no_grad():
        hooks = ra.mean().patch_hooks(scale=-30.0)
        logits = model.run_with_hooks(model.to_tokens("w5 w7"), fwd_hooks=hooks)[0, -1]
    assert one.after.target == pytest.approx(logits.softmax(-1)[8].item(), rel=1e-4)
    assert (one.scale, one.found) == (-30.0, None)
    with pytest.raises(BadInput, match="found scale='worst'; give a number, or 'best'"):
        unchecked(patched_predictions)(model, "w5 w7", ra, target=" w8", scale="worst")


def test_answers_of_one_token_are_appended_too_beside_those_of_several(shared: Any) -> None:
    # The maps of all of them are then of prompt and answer.
    model = shared("gpt2", KINDS[0])
    prompts, targets = ["w5 w7", "w4 w6"], [" w8", " w9 w10"]
    _, ra = run_with_ra(model, prompts, target=targets)
    one, two = patched_predictions(model, prompts, ra, target=targets)
    for found in (one, two):
        before, after = found.before.target, found.after.target
        assert before is not None
        assert after is not None
        assert after > before
    with torch.no_grad():
        chances = model(model.to_tokens("w5 w7"))[0, -1].softmax(-1)
    assert one.before.target == pytest.approx(float(chances[8]), rel=1e-4)


def test_the_probability_of_several_tokens_is_that_of_all_of_them(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, "w5 w7", target=" w8 w9")
    one = patched_predictions(model, "w5 w7", ra, target=" w8 w9")[0].before
    with torch.no_grad():
        chances = model(model.to_tokens("w5 w7 w8 w9")).softmax(-1)[0]
    ids = model.to_tokens("w5 w7 w8 w9")[0]
    assert one.target == pytest.approx((chances[-3, ids[-2]] * chances[-2, ids[-1]]).item(), 1e-4)
    assert one.rank == 1 + int((chances[-3] > chances[-3, ids[-2]]).sum())


def test_predictions_stand_in_the_page(ra: RACache, path: Path) -> None:
    before = Predictions(((" Rome", 0.25), (" Oslo", 0.0012)), 0.25, 1)
    after = Predictions(((" Rome", 0.75),), 0.75, 1)
    write_report(ra, path, examples=[0], patched=[PatchedPrompt(-30.0, before, after)])
    text = read(path).text
    assert "As it is 25.0 % 1 “·Rome” 25.0 % · “·Oslo” 0.120 %" in text
    assert "Patched, −30 75.0 % 1 “·Rome” 75.0 %" in text
    assert "<svg" not in path.read_text(encoding="utf-8")  # no other scale was tried
    assert "−30 times this prompt’s own R" in text


def test_the_curve_stands_in_the_page_with_the_best_scale_and_the_papers(
    ra: RACache, path: Path
) -> None:
    losses = torch.tensor([[6.0, 4.0, 1.0, 0.5, 2.0]], dtype=torch.float64)
    found = BestScale((-3000.0, -30.0, -4.0, -0.5, 0.0), losses, (-losses).exp())
    side = Predictions(((" Rome", 0.25),), 0.25, 1)
    patched = PatchedPrompt(-0.5, side, side, "scores", found)
    write_report(ra, path, examples=[0], patched=[patched])
    page = read(path)
    assert "−0.5 times this prompt’s own R is added to the attention scores" in page.text
    assert "Of 5 scales this one makes the loss smallest; it was chosen" in page.text
    assert "At −30, the paper’s scale for a mean over prompts, p(target) is 1.83 %" in page.text
    assert "best, −0.5" in page.text
    assert "the paper’s −30" in page.text
    [line] = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    places = [tuple(map(float, point.split(","))) for point in str(line).split()]
    assert len(places) == 5
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    # asinh(s / 0.03), from the first scale to the last; a probability is up to the axis of 1.
    across = [math.asinh(s / 0.03) for s in found.scales]
    shares = [(a - across[0]) / (across[-1] - across[0]) for a in across]
    (x0, _), (x1, _) = places[0], places[-1]
    assert [x for x, _ in places] == pytest.approx([x0 + s * (x1 - x0) for s in shares], abs=0.1)
    rules = [float(str(a["y1"])) for t, a in page.tags if t == "line" and a.get("class") == "rule"]
    floor, ceiling = max(rules), min(rules)
    heights = [(floor - y) / (floor - ceiling) for _, y in places]
    assert heights == pytest.approx((-losses[0]).exp().tolist(), abs=1e-3)
    marks = [a for t, a in page.tags if t == "circle" and a.get("r") in ("5", "8")]
    centres = {str(a["class"]): (float(str(a["cx"])), float(str(a["cy"]))) for a in marks}
    assert centres == {"best": places[3], "paper": places[1]}


def test_small_probabilities_have_an_axis_of_their_own(ra: RACache, path: Path) -> None:
    losses = torch.tensor([[9.0, 8.0]], dtype=torch.float64)
    svg = scale_svg(BestScale((-1.0, 0.0), losses, (-losses).exp()))
    assert ">0.05 %<" in svg
    nothing = torch.tensor([[math.nan, 1e6]], dtype=torch.float64)
    assert ">100 %<" in scale_svg(BestScale((-1.0, 0.0), nothing, (-nothing).exp()))
    paper_is_best = BestScale((-30.0, 0.0), losses.flip(1), (-losses.flip(1)).exp())
    assert "best, −30" in scale_svg(paper_is_best)


def test_predictions_of_other_prompts_are_refused(ra: RACache, shared: Any, path: Path) -> None:
    one = Predictions(())
    with pytest.raises(BadInput, match="of 1 prompts for a report on 2"):
        write_report(ra, path, patched=[PatchedPrompt(-30.0, one, one)])
    with pytest.raises(BadInput, match="found 1 prompts for a cache of 2"):
        patched_predictions(shared("gpt2", KINDS[0]), "w5", ra)


# ---- files --------------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file_and_nothing_else(
    ra: RACache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("<p>old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BadInput, match=r"No space left on device.*Free some space"):
        write_report(ra, path)
    assert path.read_text() == "<p>old"
    assert os.listdir(path.parent) == ["report.html"]


def test_an_interrupt_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(file_module, "_mode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        file_module.write_whole(path, "text")
    assert os.listdir(path.parent) == []


def test_the_file_has_the_mode_that_open_would_give(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("")
    file_module.write_whole(path, "text")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o640)
    file_module.write_whole(path, "more")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_keeps_pointing(path: Path) -> None:
    link = path.with_name("link.html")
    link.symlink_to(path)
    assert file_module.write_whole(link, "text") == path
    assert link.is_symlink()
    assert path.read_text() == "text"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("missing/report.html", "no folder"),
        (".", "is a folder"),
        ("file/report.html", "no folder"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_paths_that_cannot_be_written_are_refused(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=message):
        check_output(tmp_path / where)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_takes_no_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(BadInput, match="Permission denied"):
        check_output(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top=0"),
        ({"examples": [2]}, "example=2"),
        ({"examples": []}, r"examples=\[\]"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    ra: RACache, path: Path, options: Any, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        write_report(ra, path, **options)
    assert not path.exists()


def test_maps_are_needed(ra: RACache, path: Path) -> None:
    norms = RACache(sites=ra.sites, store="norms", info=ra.info, loss=ra.loss)
    for layer in ra.layers:
        norms._put_norms(layer, "ra", ra["ra", layer])
    with pytest.raises(NotStored, match="store='maps'"):
        write_report(norms, path)
    assert not path.exists()


def test_a_cache_writes_its_own_report(tmp_path):
    ra = make()
    ra.to_html(tmp_path / "a.html", top=3, title="Mine")
    write_report(ra, tmp_path / "b.html", top=3, title="Mine")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
