"""What a drawing of a latent space says in words: its plane, its arrows, whose keys they are."""

from __future__ import annotations

from ra_lens.latent.layout import Drawing
from ra_lens.latent.space import LatentSpace


def said_of_plane(space: LatentSpace) -> tuple[str, str]:
    """Say what each dimension is, and its share of the variance."""
    first, second = (f"{100 * share:.0f} % of the variance" for share in space.variance)
    return f"first component: {first}", f"second: {second}"


def said_of_arrows(space: LatentSpace, drawing: Drawing, step: float | None) -> str:
    """Say what arrows are, by how much their length is scaled, and how much of δ they show."""
    sides = zip(("queries’", "keys’"), (space.queries, space.keys), drawing.times, strict=True)
    each = [
        f"{name} × {times:.3g} ({100 * side.seen:.0f} % of δ² in this plane)"
        for name, side, times in sides
        if times
    ]
    if not each:
        return "no arrows: nothing moves them in this plane, or their gradients were not kept"
    if step is not None:
        return f"arrows: −δ of a step of descent of size {step:.3g}: {', '.join(each)}"
    return f"arrows: −δ of a step of descent, length scaled: {', '.join(each)}"


def said_of_sharing(space: LatentSpace) -> str:
    """Say which heads read the same keys; nothing where it is this one alone."""
    heads = space.shared_by
    if len(heads) == 1:
        return ""
    return f"heads {heads[0]} to {heads[-1]} read these keys: a key’s arrow is of all {len(heads)}"


def said_of_limits() -> tuple[str, ...]:
    """Say how to read a drawing, and what it cannot show."""
    return (
        "Attention is decided by q·k, hence by lengths and angles from the vector 0 (the small "
        "cross), not by the distance of two points. Vectors are as they enter q·k, rotated where "
        "the model rotates; the plane shows the share of their variance that its axes say.",
    )
