"""`best_scale`: the factor of attention patching that lowers the loss of some prompts most.

    A' = A + scale · map        −log p(target) under A', at each of some scales

The paper adds −30 times a mean over 25 prompts and did not tune the number. What a scale does
depends on the size of the maps: one prompt's own map is 10 to 100 times as large as a mean, whose
entries largely cancel, and a map shrinks with the loss. So the scale is found by trying: the loss
at every scale, by forward passes only, and the smallest of them. It is chosen on the prompts given;
what it does to others is for others to say.

Cost: a forward pass per prompt and scale, without gradients, `batch_size` of them at a time, with
logits where the targets are predicted. No row is padded: prompts of one length run together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.fitting import rows_of_forward
from ra_lens.head_names import Heads, list_heads
from ra_lens.inputs import Given, Mask
from ra_lens.model import Layers, PrependBos, as_lens
from ra_lens.model.sites import StoredKind, read_stored_kind
from ra_lens.numbers import (
    BatchSize,
    Real,
    Reals,
    Wholes,
    places,
    read_batch_size,
    real,
    reals,
)
from ra_lens.padding import of_one_length
from ra_lens.patching.hooks import Where, check_variant, scaled_hooks
from ra_lens.patching.mean import MeanMaps
from ra_lens.patching.place import Align, Rows
from ra_lens.prompts import PromptInput, Prompts, read_decoder_prompts, read_prompts
from ra_lens.targets import Answers, Objective, as_objective
from ra_lens.text import scale_name

if TYPE_CHECKING:
    import pandas as pd

PAPER_SCALES = (
    3.0, 2.0, 1.0, 0.5, 0.0, -0.1, 0.25, -0.5, -1.0, -2.0, -4.0, -6.0, -8.0, -10.0, -15.0, -20.0,
    -25.0, -30.0, -35.0, -40.0, -60.0, -80.0, -100.0, -120.0,
)  # fmt: skip
"""The 24 scales of the paper's code, in its order."""

SCALES = tuple(
    sorted({*PAPER_SCALES, -0.01, -0.03, -0.3, -200.0, -300.0, -600.0, -1000.0, -3000.0})
)
"""What `best_scale` tries: the paper's scales, and smaller and larger ones for maps of other sizes.

A prompt's own map is large, and takes a small scale; the maps of sure answers are small.
"""

PAPER_SCALE: dict[str, float] = {"ra": -30.0, "pattern": 1.0}
"""The scales that the paper reports, by the kind of map."""


def axis_position(scale: float, linear: float) -> float:
    """Give where on an axis of both signs a scale is drawn: asinh(scale / linear).

    Scales below `linear` are spaced in proportion, scales above it by their logarithm.
    """
    return math.asinh(scale / linear)


def axis_ticks(
    scales: Sequence[float], first: Sequence[float], *, linear: float, apart: float = 0.085
) -> list[float]:
    """Choose which of the scales are labelled: as many as stay apart, those in `first` first.

    `apart` is a share of the axis.
    """
    span = axis_position(max(scales), linear) - axis_position(min(scales), linear) or 1.0
    wanted = [scale for scale in first if scale in scales]
    kept: list[float] = []
    for scale in wanted + sorted(scales, key=abs, reverse=True):
        place = axis_position(scale, linear)
        if all(abs(place - axis_position(other, linear)) >= apart * span for other in kept):
            kept.append(scale)
    return sorted(kept)


@dataclass(frozen=True, eq=False, repr=False)
class BestScale:
    """The losses of some prompts at some scales, and which scale is best.

    Attributes:
        scales: What was tried, smallest first; 0 is the model as it is.
        loss_per_prompt: −log p of the target; for one of several tokens the mean over its tokens.
            NaN where a patched model gave NaN.
        probability: Of the target, of all its tokens together.
        kind: What was added: `"ra"`, or `"pattern"`.
        at: Where: to the `"pattern"`, or to the `"scores"`.
    """

    scales: tuple[float, ...]
    loss_per_prompt: Float[Tensor, "prompt scale"]
    probability: Float[Tensor, "prompt scale"]
    kind: StoredKind = "ra"
    at: Where = "pattern"

    @property
    def losses(self) -> Float[Tensor, "scale"]:
        """The mean loss at each scale."""
        return self.loss_per_prompt.mean(dim=0)

    @property
    def scale(self) -> float:
        """The scale of the smallest mean loss; of several such the one nearest to 0."""
        losses = self.losses.nan_to_num(math.inf, math.inf).tolist()
        tried = zip(losses, map(abs, self.scales), self.scales, strict=True)
        return min(tried)[-1]

    @property
    def loss(self) -> float:
        """The mean loss at the best scale."""
        return self.loss_at(self.scale)

    @property
    def unpatched_loss(self) -> float:
        """The mean loss of the model as it is."""
        return self.loss_at(0.0)

    @property
    def at_the_end(self) -> bool:
        """Whether the best scale is the first or last tried, so that one beyond may be better."""
        return self.scale != 0 and self.scale in (self.scales[0], self.scales[-1])

    def loss_at(self, scale: Real) -> float:
        """The mean loss at a scale that was tried; else BadInput."""
        return float(self.losses[self._place(scale)])

    def probability_at(self, scale: Real) -> float:
        """The target's mean probability at a scale that was tried; else BadInput."""
        return float(self.probability[:, self._place(scale)].mean())

    def of_prompts(self, which: Wholes | slice) -> BestScale:
        """The same of one prompt, or of some of them, with their own best scale.

        Raises:
            BadInput: a prompt that is not there, or none.
        """
        index = places("which", which, len(self.loss_per_prompt), "prompts")
        loss, probability = self.loss_per_prompt[index], self.probability[index]
        return replace(self, loss_per_prompt=loss, probability=probability)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per prompt and scale: its loss, and the target's probability."""
        import pandas as pd  # late, as it takes long to import

        n, k = self.loss_per_prompt.shape
        return pd.DataFrame(
            {
                "prompt": [i for i in range(n) for _ in range(k)],
                "scale": list(self.scales) * n,
                "loss": self.loss_per_prompt.flatten().tolist(),
                "probability": self.probability.flatten().tolist(),
            }
        )

    def __repr__(self) -> str:
        """Say which scale is best, beside the model as it is and the paper's scale."""
        n, paper = len(self.loss_per_prompt), PAPER_SCALE.get(self.kind)
        names = {0.0: "unpatched", self.scale: "best"}
        if self.scale == 0:
            names = {0.0: "unpatched, and best"}
        if paper in self.scales:
            names[paper] = f"{names[paper]}, the paper's" if paper in names else "the paper's"
        what = "RA" if self.kind == "ra" else f"the {self.kind}"
        lines = [
            f"BestScale {scale_name(self.scale)}, of {len(self.scales)} tried on {n} prompt"
            f"{'s' * (n != 1)}: {what} added to the {self.at}",
            *(
                f"  {scale_name(scale):>6}: loss {self.loss_at(scale):.4g}, "
                f"p(target) {self.probability_at(scale):.3g}   {names[scale]}"
                for scale in sorted(names)
            ),
        ]
        if self.at_the_end:
            lines.append("  the best is the last tried: give scales= beyond it")
        return "\n".join(lines)

    def _place(self, given: Real) -> int:
        scale = real("scale", given)
        if scale not in self.scales:
            tried = ", ".join(map(scale_name, self.scales))
            raise BadInput(f"found scale={scale}, which was not tried; these were: {tried}.")
        return self.scales.index(scale)


def best_scale(
    model: nn.Module,
    maps: MeanMaps | RACache,
    prompts: PromptInput,
    targets: Answers | Objective,
    *,
    scales: Reals = SCALES,
    kind: str = "ra",
    heads: Heads = None,
    layers: Layers = None,
    rows: Rows = None,
    align: Align = "exact",
    renormalise: bool = False,
    at: Where = "pattern",
    batch_size: BatchSize = 32,
    prepend_bos: PrependBos = None,
    attention_mask: Mask | None = None,
    decoder_input: Given | None = None,
    progress: bool = True,
) -> BestScale:
    """Patch prompts at many scales; find the one at which the targets' mean loss is smallest.

    The loss is that of `run_with_ra`: −log p of the target, for one of several tokens the mean over
    its tokens, each read with the right ones before it. Prompts and targets are read as there; a
    target of several tokens is appended to its prompt, as it was when the maps were made. Nothing
    stays on the model; hooks that are on it stay in force. Costs a forward pass per prompt and
    scale, without gradients.

    Args:
        model: A HookedTransformer or TransformerBridge.
        maps: What to add: mean maps, `ra.mean()`, the same for every prompt; or the cache of these
            prompts, of which each gets its own maps.
        prompts: As `run_with_ra` reads them: text, several texts, or token ids.
        targets: One for all, or one per prompt: text, token ids, or `answer_nll` or `sequence_nll`
            of `ra_lens.targets`.
        scales: What is tried. 0, the model as it is, is always among them.
        kind: `"ra"`, or `"pattern"` for forward attention.
        heads: As in `patch_hooks`, and so are the next five.
        layers: Which layers.
        rows: Which query rows of the maps.
        align: Where a map goes in prompts of another length.
        renormalise: Keep rows of the pattern distributions.
        at: `"pattern"` or `"scores"`.
        batch_size: Rows of a forward pass, a row being one prompt at one scale; `"auto"`: as many
            as fit what the model's device has free (`ra_lens.fitting`).
        prepend_bos: What stands in front of text, as in `run_with_ra`.
        attention_mask: For token ids with padding: 1 at real tokens.
        decoder_input: For encoder-decoders, as in `run_with_ra`.
        progress: False hides the progress bar, which there is for several batches.

    Returns:
        The loss of each prompt and its target's probability at each scale, and the best scale.

    Raises:
        BadInput: maps that do not fit the prompts, another number of prompts than the cache holds,
            a loss that is not an answer's, or an option that cannot be used.
        NotStored: maps that were not kept.
        UnsupportedModel: a model whose attention cannot be edited in this way.
        NothingToDifferentiate: logits that are NaN before any patch.
    """
    lens = as_lens(model)
    lens.refuse_meta()
    lens.refuse_dropout()
    check_variant(at, renormalise=renormalise)
    tried = tuple(sorted({*reals("scales", scales), 0.0}))
    at_a_time = read_batch_size(batch_size)
    objective = as_objective(targets, None)
    if objective.kind not in ("answer_nll", "sequence_nll"):
        raise BadInput(
            f"found a loss of the kind {objective.kind!r}; scales are compared by −log p of "
            "answers. Give them as targets: text, token ids, or answer_nll or sequence_nll of "
            "ra_lens.targets."
        )
    read = read_prompts(lens, prompts, attention_mask=attention_mask, prepend_bos=prepend_bos)
    encoded = None
    if lens.reads == "input, then answer":
        encoded, read = read, read_decoder_prompts(lens, decoder_input, len(read))
    elif decoder_input is not None:
        raise BadInput(f"found decoder_input, but {lens.name} has no decoder beside its encoder.")
    bound, read = objective.bind(lens, read)
    positions = bound.positions or []
    read, encoded = read.unpadded(), None if encoded is None else encoded.unpadded()
    # What every batch reads again: an iterator is empty after the first.
    chosen: Any = None if heads is None else list_heads(heads)
    layers = list(layers) if isinstance(layers, Iterator) else layers
    rows = list(rows) if isinstance(rows, Iterator) else rows
    if at_a_time == "auto":
        at_a_time = rows_of_forward(lens, read, n_read=max(map(len, positions)), added=2)
    parts = _batches(maps, read, encoded, len(tried), at_a_time)
    losses = torch.full((len(read), len(tried)), math.nan, dtype=torch.float64)
    for own, rows_here in _with_progress(parts, show=progress and len(parts) > 1):
        of_prompts, of_scales = (list(column) for column in zip(*rows_here, strict=True))
        factors = torch.tensor([tried[s] for s in of_scales])
        hooks = scaled_hooks(
            own.by_layer(kind),
            own.sites,
            factors,
            heads=chosen,
            layers=layers,
            rows=rows,
            align=align,
            renormalise=renormalise,
            at=at,
        )
        batch = read.chosen(of_prompts).lay_out(lens)
        source = None if encoded is None else encoded.chosen(of_prompts).lay_out(lens).model_input
        columns = batch.columns([positions[i] for i in of_prompts])
        with torch.no_grad(), lens.only_run():
            logits = lens.logits_at(*batch.model_input, columns, hooks, source)
        lens.refuse_nan(logits[(factors == 0).to(logits.device)])
        losses[of_prompts, of_scales] = bound.part(of_prompts)(logits).double().cpu()
    lengths = torch.tensor([len(row) for row in bound.targets or []], dtype=torch.float64)
    chances = (-losses * lengths.unsqueeze(1)).exp()
    return BestScale(tried, losses, chances, read_stored_kind(kind), at)


Batch = tuple[MeanMaps, list[tuple[int, int]]]  # what is added, and to which prompts at which scale


def _batches(
    maps: object, prompts: Prompts, encoded: Prompts | None, n_scales: int, batch_size: int
) -> list[Batch]:
    """Divide prompts times scales into batches that read one length and are added one map."""
    every = range(n_scales)
    if isinstance(maps, MeanMaps):
        groups = [(maps, group) for group in of_one_length(prompts, encoded)]
    elif isinstance(maps, RACache):
        groups = [(own, [i]) for i, own in enumerate(_own_maps(maps, len(prompts)))]
    else:
        raise BadInput(
            f"found maps of type {type(maps).__name__}. Give ra.mean(), or the cache of these "
            "prompts, as run_with_ra gives it."
        )
    return [
        (own, rows[start : start + batch_size])
        for own, group in groups
        for rows in [[(i, scale) for i in group for scale in every]]
        for start in range(0, len(rows), batch_size)
    ]


def _own_maps(ra: RACache, n: int) -> list[MeanMaps]:
    """Give the maps of each prompt of a cache, without padding."""
    if ra.batch_size != n:
        raise BadInput(
            f"found {n} prompts for a cache of {ra.batch_size}. Give the prompts that run_with_ra "
            "was given, or ra.mean(), which goes on any."
        )
    if not ra.has_batch_dim:
        return [ra.mean()]
    if ra.store == "mean":
        raise NotStored(
            "this run had store='mean', which keeps no prompt's own maps. Give ra.mean(), or run "
            "again with store='maps'."
        )
    return [ra.apply_slice_to_batch_dim([i]).mean() for i in range(n)]


def _with_progress(parts: list[Batch], *, show: bool) -> Iterable[Batch]:
    if not show:
        return parts
    from tqdm.auto import tqdm

    return tqdm(parts, desc="Scales", unit="batch")
