"""Intervals around a biased statistic: by hand, what they always hold, and what they cover."""

from __future__ import annotations

import itertools
from math import pi, sqrt, tan

import numpy as np
import pytest

from ra_lens.heads.agreement import spearman
from ra_lens.heads.intervals import interval_around, student_t

NO_CELL = np.array([np.nan, np.nan])


def test_student_t_is_that_of_the_tables():
    printed = {1: 6.314, 2: 2.920, 5: 2.015, 11: 1.796, 30: 1.697, 1000: 1.646}
    assert {n: round(student_t(0.9, float(n)), 3) for n in printed} == printed
    assert student_t(0.95, 5.0) == pytest.approx(2.571, abs=5e-4)
    assert student_t(0.3, 1.0) == pytest.approx(tan(0.15 * pi))  # Cauchy's, as a formula
    assert 2.015 < student_t(0.9, 3.5) < 2.920


def test_an_interval_of_one_cell_by_hand():
    draws = np.array([9.0, 7.0, 8.0, 15.0, 11.0])  # a quarter is below 8, the middle 9, 11
    # Of two prompts: √(2/1), t of one degree of freedom tan 45°, z .67449.
    stretch = sqrt(2) * 1 / 0.6744898
    low, high = interval_around(3.0, [draws], [2], level=0.5)
    assert (low, high) == (pytest.approx(3 - stretch), pytest.approx(3 + 2 * stretch))
    assert interval_around(3.0, [draws], [2], level=0.5, within=(2.5, 5.0)) == (2.5, 5.0)
    known = np.array([np.nan, *draws])
    assert interval_around(3.0, [known], [2], level=0.5) == (low, high)


def test_the_spread_of_a_mean_over_cells_is_that_of_the_mean():
    """Normal cells: the variance is a ninth of the sum, n − 1 of Welch and Satterthwaite."""
    generator = np.random.default_rng(0)
    sizes, spreads = [5, 10, 20], np.array([[1.0], [2.0], [0.5]])
    drawn = spreads * generator.normal(size=(3, 50_000)) + 7
    low, high = interval_around(1.0, list(drawn), sizes, level=0.9)
    variances = np.array([1 * 5 / 4, 4 * 10 / 9, 0.25 * 20 / 19])
    freedom = variances.sum() ** 2 / (variances**2 / np.array([4, 9, 19])).sum()
    wanted = student_t(0.9, float(freedom)) * sqrt(variances.sum()) / 3
    assert (1 - low, high - 1) == (pytest.approx(wanted, rel=0.02), pytest.approx(wanted, rel=0.02))


@pytest.mark.parametrize(
    ("value", "drawn", "sizes"),
    [
        (0.5, [np.array([0.1, 0.9])], [1]),  # one prompt says nothing of others
        (np.nan, [np.array([0.1, 0.9])], [4]),
        (0.5, [NO_CELL], [4]),
        (0.5, [np.array([0.1, np.nan]), np.array([np.nan, 0.2])], [4, 4]),
    ],
)
def test_where_nothing_is_known_there_is_none(value, drawn, sizes):
    assert np.isnan(interval_around(value, drawn, sizes, level=0.9)).all()


def test_an_interval_holds_its_value_wherever_the_draws_lie():
    generator = np.random.default_rng(1)
    for _ in range(50):
        drawn = [generator.normal(generator.normal(0, 9), 1, 30) ** 3 for _ in range(3)]
        low, high = interval_around(0.3, drawn, [2, 5, 9], level=0.9, within=(0.0, 1.0))
        assert 0 <= low <= 0.3 <= high <= 1
    rounded = 1 + 2**-52
    assert interval_around(rounded, [np.ones(9)], [4], level=0.9) == (rounded, rounded)
    low, high = interval_around(rounded, [np.arange(9) / 9], [4], level=0.9, within=(-1.0, 1.0))
    assert low < rounded == high


def percentile(value, draws):
    return np.quantile(draws, [0.05, 0.95])


def basic(value, draws):
    low, high = percentile(value, draws)
    return 2 * value - high, 2 * value - low


def coverage(n, noise, own, size, trials, seed=7, heads=60):
    """Shares of 90 % intervals that hold the mean ρ of `n` prompts, and that hold their own ρ.

    Effects of a head vary around its mean, those of a prompt with heavy tails. Scores are the
    effects of the same prompts, misjudged for good by `own` and a little by each prompt; of `size`
    both are without their sign.
    """
    generator = np.random.default_rng(seed)
    means, wrong = generator.standard_t(3, heads) / 2, generator.normal(0, own, heads)

    def drawn(many):
        effects = means + noise * generator.standard_t(4, (many, n, heads))
        scores = effects + wrong + own / 2 * generator.normal(size=(many, n, heads))
        return (np.abs(effects), np.abs(scores)) if size else (effects, scores)

    effects, scores = drawn(5 * trials)
    values = spearman(effects.mean(axis=1), scores.mean(axis=1))
    ways = {
        "around": lambda v, d: interval_around(float(v), [d], [n], level=0.9, within=(-1.0, 1.0)),
        "percentile": percentile,
        "basic": basic,
    }
    held, own_held = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for i in range(trials):
        weights = generator.multinomial(n, np.full(n, 1 / n), size=150) / n
        draws = spearman(weights @ effects[i], weights @ scores[i])
        for name, way in ways.items():
            low, high = way(values[i], draws)
            held[name] += low <= values.mean() <= high
            own_held[name] += low <= values[i] <= high
    return [{name: n / trials for name, n in found.items()} for found in (held, own_held)]


def test_a_mirror_image_of_the_draws_excludes_what_they_exclude():
    # Scores that share the noise of the prompts with the effects, as those of `nap` do.
    _, own_held = coverage(12, noise=2, own=0.5, size=False, trials=12)
    assert own_held["around"] == 1
    assert own_held["basic"] == own_held["percentile"] < 0.9


@pytest.mark.every_model
def test_intervals_cover_the_mean_of_as_many_prompts():
    found = [
        coverage(n, noise, own, size, trials=200)[0]
        for n, (noise, own, size) in itertools.product(
            (6, 12), ((0.7, 0.5, False), (2, 0.5, False), (0.7, 2, False), (2, 1, True))
        )
    ]
    by_way = {name: [held[name] for held in found] for name in found[0]}
    assert min(by_way["around"]) > 0.75 and np.mean(by_way["around"]) > 0.84
    assert min(by_way["percentile"]) < 0.65
    assert np.mean(by_way["basic"]) < 0.65
