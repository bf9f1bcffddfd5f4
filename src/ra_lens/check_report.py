"""What `check_model` found: one row per attention layer, and what holds for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Route = Literal["pattern", "z", "refused"]
Padded = Literal["together", "by length"]


@dataclass(frozen=True)
class SiteReport:
    """What holds for one attention layer.

    Attributes:
        layer: Its key, as in `ra["ra", layer]`.
        label: `layer 5`, `encoder 0`, `decoder 1 cross`.
        hook: Full name of its hook_pattern.
        observe_only: Whether hook_pattern only shows what the model has already used.
        scale: Softmax scale; None if unknown.
        patches: How maps are added: at the `pattern`, through `z`, or `refused`.
        reason: Why they are refused.
        n_heads: Query heads.
        n_key_value_heads: Key/value heads.
        notes: What is unusual.
    """

    layer: int
    label: str
    hook: str
    observe_only: bool
    scale: float | None
    patches: Route
    reason: str
    n_heads: int
    n_key_value_heads: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelReport:
    """What ra_lens does with a model; `print` shows it as a table.

    Attributes:
        model: Its name.
        model_class: `HookedTransformer` or `TransformerBridge`.
        reads: How it comes to its logits.
        dtype: Of its weights.
        sites: One row per attention layer.
        logits_error: Relative difference from the logits of the Hugging Face model inside, up to
            rounding 0; None where there is none to compare with (HookedTransformer, processed
            weights).
        padded_left: How prompts of different lengths run that are padded on the left: `together`,
            or `by length` where padding changes what the model computes. None: not tried.
        padded_right: The same for padding on the right.
        problems: Reasons not to trust maps or patches.
        notes: What else to know.
    """

    model: str
    model_class: str
    reads: str
    dtype: str
    sites: tuple[SiteReport, ...]
    logits_error: float | None
    padded_left: Padded | None
    padded_right: Padded | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that speaks against the maps and patches of this model."""
        return not self.problems

    def __str__(self) -> str:
        """Say it all, with one line for neighbouring layers that are alike."""
        lines = [f"{self.model} ({self.model_class}, {self.dtype}, reads {self.reads})", ""]
        lines += _table(self.sites)
        refused = {site.reason: site.label for site in reversed(self.sites) if site.reason}
        lines += [f"Patches of {label}: {reason}" for reason, label in refused.items()]
        if self.logits_error is not None:
            lines.append(f"Logits against Hugging Face's own: {self.logits_error:.1e}")
        lines += _padding(self)
        lines += [f"Note: {note}." for note in self.notes]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        if self.ok:
            lines.append("Nothing speaks against the maps of this model.")
        return "\n".join(lines)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per attention layer."""
        import pandas as pd

        rows = [{**asdict(site), "notes": "; ".join(site.notes)} for site in self.sites]
        return pd.DataFrame(rows).assign(model=self.model, model_class=self.model_class)


def _padding(report: ModelReport) -> list[str]:
    sides = {"left": report.padded_left, "right": report.padded_right}
    hidden = [side for side, how in sides.items() if how == "together"]
    shown = [side for side, how in sides.items() if how == "by length"]
    lines: list[str] = []
    if hidden:
        lines.append(
            f"Padding on the {' or '.join(hidden)}: each prompt computes what it does alone"
        )
    if shown:
        lines.append(
            f"Padding on the {' or '.join(shown)} changes what the model computes: prompts run in "
            "groups of one length, without padding"
        )
    return lines


_HEADER = ("layer", "hook", "hook_pattern is", "softmax scale", "patches", "heads", "notes")


def _table(sites: Sequence[SiteReport]) -> list[str]:
    groups = [list(group) for _, group in groupby(sites, key=_alike)]
    rows = [_HEADER, *map(_cells, groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [lines[0].rstrip(), "─" * len(lines[0]), *(line.rstrip() for line in lines[1:]), ""]


def _alike(site: SiteReport) -> SiteReport:
    kind = site.hook.translate(str.maketrans("", "", "0123456789"))
    return replace(site, layer=0, label="", hook=kind, reason="")


def _cells(group: Sequence[SiteReport]) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    several = len(group) > 1
    heads = f"{first.n_heads}"
    if first.n_key_value_heads != first.n_heads:
        heads += f" ({first.n_key_value_heads} key/value)"
    return (
        f"{first.layer}…{last.layer}" if several else str(first.layer),
        first.hook.replace(f".{first.label.split()[1]}.", ".{…}.", 1) if several else first.hook,
        "observe-only" if first.observe_only else "in the path",
        "unknown" if first.scale is None else f"{first.scale:.4g}",
        first.patches if first.patches == "refused" else f"through {first.patches}",
        heads,
        "; ".join(first.notes),
    )
