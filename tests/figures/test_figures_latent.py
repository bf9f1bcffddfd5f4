"""`latent_space`: where queries and keys lie, what moves them, and labels that can be read."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from made_caches import ROWS, make, with_vectors
from ra_lens import run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import NotStored
from ra_lens.figures import latent_space
from ra_lens.latent import latent_space_of, lay_out
from refused import refused
from tiny_models import KINDS, every_model

WORDS = tuple(f" word{i}" for i in range(16))


@pytest.fixture
def ra() -> RACache:
    return with_vectors(make())


def of(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def at(trace: Any) -> np.ndarray:
    return np.stack([trace.x, trace.y], axis=1)


def principal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two principal components by the covariance matrix, and their shares of the variance."""
    values, directions = np.linalg.eigh(np.cov(vectors.T))
    return directions[:, ::-1][:, :2], values[::-1][:2] / values.sum()


def cell_names(ra: RACache, layer: int, head: int, example: int, k: int) -> list[tuple[int, int]]:
    values = ra["ra", layer][example, head].abs()
    order = values.flatten().argsort(descending=True)[:k].tolist()
    return [divmod(i, values.shape[1]) for i in order]


# ---- the plane ----------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_points_are_the_first_two_components_of_queries_and_keys(side: str, example: int) -> None:
    ra = with_vectors(make(side=side))
    n, start = len(ROWS[example]), ra.info.starts[example]
    kept = slice(start, start + n)
    vectors, gradients = (
        [ra[kind, 2][example, kept, 1].double().numpy() for kind in kinds]
        for kinds in (("query", "key"), ("query_grad", "key_grad"))
    )
    plane, shares = principal(np.concatenate(vectors))
    mean = np.concatenate(vectors).mean(axis=0)
    figure = latent_space(ra, (2, 1), example=example)
    signs = None
    for name, own, grad in zip(("queries", "keys"), vectors, gradients, strict=True):
        found, wanted = at(of(figure, name)), (own - mean) @ plane
        if signs is None:  # the direction of a component is free
            signs = np.sign((found * wanted).sum(axis=0))
        np.testing.assert_allclose(found, wanted * signs, atol=1e-5)
        told = np.asarray(of(figure, name).customdata, float)
        np.testing.assert_array_equal(told[:, 0], np.arange(n))
        np.testing.assert_allclose(told[:, 1], np.linalg.norm(own, axis=1), rtol=1e-6)
        np.testing.assert_allclose(told[:, 2], np.linalg.norm(grad, axis=1), rtol=1e-6)
    np.testing.assert_allclose(at(of(figure, "zero"))[0], -mean @ plane * signs, atol=1e-5)
    titles = (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text)
    for title, share in zip(titles, shares, strict=True):
        assert f"{100 * share:.0f} % of the variance" in title
    assert of(figure, "queries").x and np.mean(of(figure, "queries").x) > np.mean(
        of(figure, "keys").x
    )


def test_a_step_is_drawn_against_the_gradient_and_its_length_is_told(ra: RACache) -> None:
    space = latent_space_of(ra, (2, 1))
    for points, kind in ((space.queries, "query"), (space.keys, "key")):
        # What moves two points together in the plane, by the points of the plane alone.
        vectors = ra[kind, 2][0, :, 1].double().numpy()
        grad = ra[f"{kind}_grad", 2][0, :, 1].double().numpy()
        inner = np.linalg.lstsq(
            vectors - vectors.mean(0), points.at - points.at.mean(0), rcond=None
        )[0]
        np.testing.assert_allclose(points.step, -grad @ inner, atol=1e-4)
        assert points.seen == pytest.approx((points.step**2).sum() / (grad**2).sum())
    for step in (None, 0.25):
        figure = latent_space(ra, (2, 1), step=step)
        text = figure.layout.title.text
        scales = [float(x) for x in re.findall(r"’ × ([\d.]+(?:e[-+]\d+)?)", text)]
        assert len(scales) == 2
        arrows = [note for note in figure.layout.annotations if note.name == "step"]
        for points, name, times in zip(
            (space.queries, space.keys), ("queries", "keys"), scales, strict=True
        ):
            assert step is None or times == step
            colour = of(figure, name).marker.color
            own = [note for note in arrows if note.arrowcolor == colour]
            assert own
            for note in own:
                far = np.hypot(*(at(of(figure, name)) - [note.ax, note.ay]).T)
                i = far.argmin()
                assert far[i] < 1e-9
                moved = np.array([note.x - note.ax, note.y - note.ay])
                np.testing.assert_allclose(moved, times * points.step[i], rtol=1e-2)
            assert f"{100 * points.seen:.0f} % of δ² in this plane" in text
        assert ("length scaled" in text) == (step is None)
        assert ("of size 0.25" in text) == (step is not None)


def test_the_longest_arrows_are_a_sixth_of_the_width_or_less(ra: RACache) -> None:
    figure = latent_space(ra, (0, 2), width=700.0)
    span = np.diff(figure.layout.xaxis.range).item()
    for colour in {note.arrowcolor for note in figure.layout.annotations if note.name == "step"}:
        longest = max(
            np.hypot(note.x - note.ax, note.y - note.ay)
            for note in figure.layout.annotations
            if note.name == "step" and note.arrowcolor == colour
        )
        assert 0.05 * span < longest < 0.17 * span


def test_lines_join_the_pairs_with_the_largest_r(ra: RACache) -> None:
    figure = latent_space(ra, (2, 1), k=4)
    queries, keys = at(of(figure, "queries")), at(of(figure, "keys"))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    for trace, (query, key) in zip(reversed(lines), cell_names(ra, 2, 1, 0, 4), strict=True):
        np.testing.assert_allclose([trace.x[0], trace.y[0]], queries[query], atol=1e-9)
        np.testing.assert_allclose([trace.x[-1], trace.y[-1]], keys[key], atol=1e-9)
        value = ra["ra", 2][0, 1, query, key].item()
        assert trace.line.color.startswith("rgba(208,58,60" if value < 0 else "rgba(52,126,198")
        sign = "+" if value < 0 else "−"
        assert f"−R = {sign}{abs(value):.3g}" in trace.hovertemplate
    widths = [trace.line.width for trace in lines]
    assert widths == sorted(widths)
    assert not [trace for trace in latent_space(ra, (2, 1), k=0).data if trace.mode == "lines"]


def test_both_dimensions_have_one_scale(ra: RACache) -> None:
    figure = latent_space(ra, (2, 1), width=640)
    layout = figure.layout
    width = layout.width - layout.margin.l - layout.margin.r
    height = layout.height - layout.margin.t - layout.margin.b
    across, down = (np.diff(axis.range).item() for axis in (layout.xaxis, layout.yaxis))
    assert across / width == pytest.approx(down / height)
    assert layout.yaxis.scaleanchor == "x"


def test_a_shared_key_is_said_to_be() -> None:
    ra = with_vectors(make(), shared=3)
    space = latent_space_of(ra, (2, 1))
    assert space.shared_by == (0, 1, 2)
    text = latent_space(ra, (2, 1)).layout.title.text
    assert "heads 0 to 2 read these keys: a key’s arrow is of all 3" in text
    assert "read these keys" not in latent_space(with_vectors(make()), (2, 1)).layout.title.text


@pytest.mark.parametrize("d_head", [1, 2])
def test_few_dimensions_are_enough(d_head: int) -> None:
    figure = latent_space(with_vectors(make(), d_head=d_head), (0, 0))
    assert np.isfinite(at(of(figure, "queries"))).all()
    if d_head == 1:
        assert "100 % of the variance" in figure.layout.xaxis.title.text
        assert "0 % of the variance" in figure.layout.yaxis.title.text


def test_one_token_alone_is_drawn() -> None:
    figure = latent_space(with_vectors(make(((" a",),))), (0, 0))
    assert len(of(figure, "keys").x) == 1


# ---- labels -------------------------------------------------------------------------------------


def boxes(drawing: Any) -> list[tuple[float, float, float, float]]:
    found = []
    for dot in drawing.dots:
        if dot.label is not None:
            half = cell_len(dot.label.text) * 6.9 / 2, 7.0
            x, y = dot.label.middle
            found.append((x - half[0], y - half[1], x + half[0], y + half[1]))
    return found


@pytest.mark.parametrize("seed", [0, *every_model(1)])
@pytest.mark.parametrize("n", [16, *every_model(10)])
def test_labels_of_an_ordinary_prompt_are_all_there_and_apart(seed: int, n: int) -> None:
    ra = with_vectors(make((WORDS[:n],)), d_head=16, seed=seed)
    for layer in ra.layers:  # as in trained models: queries and keys in cones of their own
        ra["query", layer][..., 0] += 4
        ra["key", layer][..., 0] -= 4
    for head in ((0, 0), (2, 1)):
        drawing = lay_out(latent_space_of(ra, head), width=700.0)
        found = boxes(drawing)
        assert len(found) == 2 * n
        for one, other in combinations(found, 2):
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]
        for left, top, right, bottom in found:
            assert left >= 0 and top >= 0 and right <= drawing.width and bottom <= drawing.height
            for dot in drawing.dots:
                assert not (left < dot.at[0] < right and top < dot.at[1] < bottom)


def test_of_a_crowd_those_of_the_strongest_pairs_are_named(ra: RACache) -> None:
    words = tuple(f" w{i}" for i in range(30))
    ra = with_vectors(make((words,)))
    figure = latent_space(ra, (0, 0), k=3, max_tokens=30, width=200)
    shown = {(note.name, note.text) for note in figure.layout.annotations if note.name != "step"}
    assert len(shown) < 60
    for query, key in cell_names(ra, 0, 0, 0, 3):
        assert {("query", f"·w{query}"), ("key", f"·w{key}")} <= shown
    assert len(of(figure, "queries").x) == 30  # pointing at a marker tells its token


def test_a_token_that_comes_twice_has_its_position(ra: RACache) -> None:
    notes = [n.text for n in latent_space(ra, (2, 1)).layout.annotations if n.name == "key"]
    wanted = ["&lt;|end|&gt;", "·Paris (1)", "⏎", "·Paris (3)", "&lt;b&gt;&amp;&#36;x&#36;"]
    assert sorted(notes) == sorted(wanted)


def test_positions_count_in_the_whole_prompt_where_it_was_cut() -> None:
    ra = with_vectors(make((WORDS,)))
    figure = latent_space(ra, (0, 0), k=1, max_tokens=5)
    cut = ra["ra", 0][0, 0, 11:, 11:].abs()
    query, key = divmod(int(cut.argmax()), 5)
    assert figure.data[0].name == (
        f"·word{query + 11} ({query + 11}) → ·word{key + 11} ({key + 11})"
    )
    assert [row[0] for row in of(figure, "keys").customdata] == [11, 12, 13, 14, 15]


# ---- of a run, and what cannot be ---------------------------------------------------------------


def test_a_run_with_vectors_is_drawn(shared: Any) -> None:
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), "w5 w7 w9 w4", target=" w8", vectors=True)
    figure = latent_space(ra, ra.top_heads(1)[0])
    assert len(of(figure, "queries").x) == 5
    assert any(note.name == "step" for note in figure.layout.annotations)


def test_without_gradients_there_are_no_arrows(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, "w5 w7 w9", target=" w8", vectors=["query", "key"])
    figure = latent_space(ra, (0, 0))
    assert not any(note.name == "step" for note in figure.layout.annotations)
    assert "no arrows" in figure.layout.title.text


def test_without_vectors_it_says_so() -> None:
    with pytest.raises(NotStored, match=r"'query'|hook_query"):
        latent_space(make(), (0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k=-1"),
        ({"step": 0}, "step=0.*positive"),
        ({"step": -2.0}, "step=-2.*positive"),
        ({"example": 2}, "example=2"),
    ],
)
def test_mistakes_are_named(ra: RACache, options: dict[str, Any], message: str) -> None:
    refused(lambda: latent_space(ra, (0, 0), **options), {}, message)


def test_what_is_not_finite_is_refused(ra: RACache) -> None:
    ra["key", 0][0, 1, 0] = float("nan")
    refused(lambda: latent_space(ra, (0, 0)), {}, "L0H0 that are not finite")


def test_numbers_and_heads_of_every_form(ra: RACache) -> None:
    plain = latent_space(ra, (2, 1), k=3, step=0.5, example=1, max_tokens=2, width=600).to_json()
    options: dict[str, Any] = {"k": np.int64(3), "step": np.float64(0.5), "width": np.int64(600)}
    options |= {"example": torch.tensor(1), "max_tokens": np.array(2)}
    assert latent_space(ra, "L2H1", **options).to_json() == plain
    with pytest.raises(TypeError, match="unexpected keyword argument 'tilte'"):
        latent_space(ra, (0, 0), tilte="x")  # type: ignore[call-arg]


def test_tokens_stay_text_and_turn_nothing() -> None:
    ra = with_vectors(make((("<s>", "שלום", "\n", "<script>alert(1)</script>", " x"),)))
    figure = latent_space(ra, (2, 1), k=1)
    texts = [note.text for note in figure.layout.annotations if note.name == "key"]
    assert {"\u2068שלום\u2069", "⏎", "&lt;script&gt;alert…"} <= set(texts)
    assert "<script" not in str(figure.to_plotly_json())
    assert of(figure, "queries").text[1] == "\u2068שלום\u2069"
