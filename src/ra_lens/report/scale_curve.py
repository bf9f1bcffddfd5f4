"""A drawing of what a patch does at every scale, as SVG inside the page.

The target's probability against the scale, on the axis of `ra_lens.figures.scale_curve`, with the
model as it is, the paper's scale and the best one marked. Nothing in it is computed by a script;
colours are those of the page, light or dark.
"""

from __future__ import annotations

import math

from ra_lens import html
from ra_lens.scales import PAPER_SCALE, BestScale, axis_position, axis_ticks
from ra_lens.text import scale_name

_LINEAR = 0.03
_FIRST_TICKS = (0.0, -30.0, -3000.0, -1000.0, -1.0, -100.0, -10.0, -0.1, 3.0)
_WIDTH, _HEIGHT = 460, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 34, 40


def scale_svg(found: BestScale) -> str:
    """Draw the mean probability of the target at each scale."""
    chances = found.probability.nan_to_num(0.0).mean(dim=0).tolist()
    ceiling = _ceiling(max(chances))
    first, last = (axis_position(found.scales[i], _LINEAR) for i in (0, -1))
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(scale: float) -> float:
        share = (axis_position(scale, _LINEAR) - first) / ((last - first) or 1.0)
        return round(_LEFT + across * share, 1)

    def y(chance: float) -> float:
        return round(_TOP + down * (1 - chance / ceiling), 1)

    at = dict(zip(found.scales, chances, strict=True))
    bottom, paper = _TOP + down, PAPER_SCALE.get(found.kind)
    lines = [
        f'<svg class="scales" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.text(_said(found, at, paper))}">'
    ]
    for share in (0.0, 0.5, 1.0):
        height = y(share * ceiling)
        lines += [
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>',
            f'<text class="end" x="{_LEFT - 6}" y="{height + 4}">'
            f"{html.text(f'{100 * share * ceiling:.3g} %')}</text>",
        ]
    for scale in found.scales:
        lines.append(f'<path class="tick" d="M{x(scale)} {bottom}v3"/>')
    for scale in axis_ticks(found.scales, _FIRST_TICKS, linear=_LINEAR, apart=0.1):
        lines += [
            f'<path class="tick" d="M{x(scale)} {bottom}v6"/>',
            f'<text class="middle" x="{x(scale)}" y="{bottom + 18}">{scale_name(scale)}</text>',
        ]
    unpatched = y(at[0.0])
    points = " ".join(f"{x(scale)},{y(chance)}" for scale, chance in at.items())
    lines += [
        f'<text class="middle" x="{_LEFT + across / 2}" y="{_HEIGHT - 4}">scale of the map</text>',
        '<text x="2" y="12">p(target)</text>',
        f'<line class="before" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{unpatched}" '
        f'y2="{unpatched}"/>',
        f'<polyline points="{points}"/>',
    ]
    names = {"best": (found.scale, f"best, {scale_name(found.scale)}", 5)}
    if paper in at:
        names["paper"] = (paper, f"the paper’s {scale_name(paper)}", 8)
    for kind, (scale, name, radius) in names.items():
        lines.append(
            f'<circle class="{kind}" cx="{x(scale)}" cy="{y(at[scale])}" r="{radius}">'
            f"<title>{html.text(name)}: {at[scale]:.3g}</title></circle>"
        )
    left = 86  # of the legend, which stands above, where no name covers the curve
    for kind, (_, name, radius) in names.items():
        lines.append(f'<circle class="{kind}" cx="{left}" cy="8" r="{radius - 1}"/>')
        lines.append(f'<text class="{kind}" x="{left + 12}" y="12">{html.text(name)}</text>')
        left += 32 + 7 * len(name)
    lines.append(f'<path class="before" d="M{left - 4} 8h18"/>')
    lines.append(f'<text x="{left + 20}" y="12">unpatched</text>')
    return "".join([*lines, "</svg>"])


def _ceiling(chance: float) -> float:
    """Give the end of the axis: 1, 2 or 5 times a power of ten, at most 1."""
    if chance <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(chance))
    return min(1.0, next(n * power for n in (1, 2, 5, 10) if n * power >= chance * (1 - 1e-9)))


def _said(found: BestScale, at: dict[float, float], paper: float | None) -> str:
    parts = [
        f"unpatched {at[0.0]:.3g}",
        f"best at {scale_name(found.scale)}: {at[found.scale]:.3g}",
    ]
    if paper in at:
        parts.append(f"at the paper’s {scale_name(paper)}: {at[paper]:.3g}")
    return f"Probability of the target by scale: {', '.join(parts)}"
