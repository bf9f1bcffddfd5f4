"""`check_model`: what ra_lens does with a model, layer by layer, shown by doing it.

    ra_lens.check_model(model)

On a few tokens, and with nothing left behind on the model:

1. a forward pass; its logits against those of the Hugging Face model inside a TransformerBridge;
2. `run_with_ra`, which finds out whether an edit of hook_pattern reaches the model;
3. an edit: every layer's pattern moved a little along its Reversed Attention, up and down. What the
   loss does is compared with what the maps say, Σ ⟨G, edit⟩, up to third order of the edit;
4. the prompt and a shorter one in one batch, padded on the left and on the right: whether padding
   is hidden from them (`ra_lens.padding`), and whether they have the maps that each has alone.

Cost: fifteen forward passes and five backward passes of a short prompt, and one forward pass for
each layer whose pattern is only observed. The report of a model is remembered until it is processed
or converted.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, RALensError, UnsupportedModel
from ra_lens.memory import offering
from ra_lens.model import (
    Front,
    FwdHooks,
    Lens,
    PrependBos,
    Site,
    as_lens,
    default_front,
)
from ra_lens.model.values import attention_output
from ra_lens.padding import padding_is_hidden
from ra_lens.patching import patch_hooks
from ra_lens.patching.masking import by_head
from ra_lens.prompts import PaddingSide, PromptInput, Prompts, read_decoder_prompts, read_prompts
from ra_lens.run import run_with_ra
from ra_lens.text import isolated

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
        prepended: The token that TransformerLens puts in front of text by default; empty if none;
            None without a tokenizer.
        tokenizer_prepends: What the tokenizer itself, as it was published, puts there; None if that
            cannot be told.
        prepends_chat_token: Whether `prepended` belongs to chats: whether it stands literally in
            the tokenizer's chat template. `<|endoftext|>`, which ends any text, does not count.
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
    prepended: str | None
    tokenizer_prepends: str | None
    prepends_chat_token: bool
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
        lines += _padding_lines(self)
        if self.prepended is not None:
            chat = ", a token of chats" * self.prepends_chat_token
            lines.append(f"In front of text: {_quoted(self.prepended)}{chat}")
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


def _quoted(token: str) -> str:
    return isolated(repr(token)) if token else "nothing"


def _notes_on_front(front: Front | None) -> list[str]:
    if front is None or front.own is None or front.own == front.token:
        return []
    if not front.token:
        return [
            f"the tokenizer itself puts {_quoted(front.own)} in front of text, TransformerLens "
            "nothing: prepend_bos=True puts it there"
        ]
    other = f" or prepend_bos={front.separator!r}" * bool(front.separator)
    better = f"; plain text may be answered better with prepend_bos=False{other}"
    return [
        f"TransformerLens puts {_quoted(front.token)} in front of text, the tokenizer itself puts "
        f"{_quoted(front.own)} there{better * front.is_strange}"
    ]


def _padding_lines(report: ModelReport) -> list[str]:
    sides = {"left": report.padded_left, "right": report.padded_right}
    told = {
        "together": "on the {}: each prompt computes what it does alone",
        "by length": "on the {} changes what the model computes: prompts run in groups of one "
        "length, without padding",
    }
    of_each = {how: " or ".join(s for s, found in sides.items() if found == how) for how in told}
    return [f"Padding {told[how].format(which)}" for how, which in of_each.items() if which]


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


_LENGTH = 8  # tokens read where no prompt is given
_DECODER_LENGTH = 4
# Largest entry of the edit of a pattern, shared out among the layers. A smaller one is tried where
# the loss is not smooth: a mixture of experts sends a token elsewhere all at once.
_EDITS = (1e-2, 2e-3, 4e-4)
_SIDES: tuple[PaddingSide, PaddingSide] = ("left", "right")


@dataclass(frozen=True)
class _Tolerances:
    """What rounding may do, relative to the size of a thing; what is looked for is of order 1."""

    logits: float = 1e-3
    rows: float = 1e-3
    z: float = 1e-2
    change: float = 1e-5  # of the loss
    padded: float = 1e-2  # of R; in half precision it need only be finite


_OF_DTYPE = {
    torch.bfloat16: _Tolerances(logits=0.15, rows=3e-2, z=0.1, change=3e-2, padded=math.inf),
    torch.float16: _Tolerances(logits=0.15, rows=1e-2, z=0.05, change=5e-3, padded=math.inf),
}

_reports: weakref.WeakKeyDictionary[nn.Module, dict[object, ModelReport]] = (
    weakref.WeakKeyDictionary()
)


def check_model(
    model: nn.Module, *, prompt: PromptInput | None = None, prepend_bos: PrependBos = None
) -> ModelReport:
    """Check on a few tokens what ra_lens can do with a model, and how.

    Args:
        model: A HookedTransformer or TransformerBridge, in eval mode.
        prompt: Text or token ids to check with, several of one length at most. Default: eight
            tokens of the vocabulary.
        prepend_bos: For a prompt that is text: what stands in front of it, as in `run_with_ra`.

    Returns:
        A report with one row per attention layer; `print` shows it as a table.

    Raises:
        BadInput: a prompt that cannot be read, prompts of different lengths, or `prepend_bos`
            without a prompt.
        UnsupportedModel: not such a model, or one whose attention cannot be read at all.
    """
    lens = as_lens(model)
    if prompt is not None:
        return _check(lens, prompt, prepend_bos)
    if prepend_bos is not None:
        raise BadInput(
            f"found prepend_bos={prepend_bos!r} without a prompt for it to stand in front of. Give "
            "prompt= as text, or leave it out."
        )
    remembered = _reports.setdefault(model, {})
    state = lens.state
    if state not in remembered:
        remembered[state] = _check(lens, None)
    return remembered[state]


def _check(lens: Lens, prompt: PromptInput | None, prepend_bos: PrependBos = None) -> ModelReport:
    trial = _Trial(lens, prompt, prepend_bos)
    allowed, sites = trial.allowed, lens.sites
    shown, logits = trial.look()
    cache = trial.run(trial.prompts, metric=_loss)
    refusals = trial.refusals(cache)
    problems: list[str] = []
    error = trial.logits_error(logits)
    if error is not None and error > allowed.logits:
        problems.append(
            f"the logits differ from those of the Hugging Face model by {error:.1%} of their "
            "size: TransformerLens computes something else here, and the maps belong to that."
        )
    off = trial.what_edits_do(cache, [layer for layer in sites if layer not in refusals])
    if not lens.has_experts:
        problems += off
    padded, wrong = trial.padding()
    problems += wrong
    deficit = {i: float((1 - cache["pattern", i].sum(dim=-1)).abs().max()) for i in sites}
    sinks = {layer for layer, missing in deficit.items() if missing > allowed.rows}
    folded = lens.value_biases_folded
    if folded and sinks:
        problems.append(
            "value biases were folded into output biases, although rows of the pattern do not sum "
            "to 1 (attention sinks): the logits have changed. Do it with fold_value_biases=False."
        )
    problems += lens.processing_problems
    rows: list[SiteReport] = []
    for layer, site in sites.items():
        observed = bool(cache.sites[layer].observe_only)
        route: Route = "z" if observed else "pattern"
        differs = site.gate is None and _z_differs(site, shown) > allowed.z
        rows.append(
            SiteReport(
                layer=layer,
                label=site.label,
                hook=site.pattern_name,
                observe_only=observed,
                scale=site.scale,
                patches="refused" if layer in refusals else route,
                reason=refusals.get(layer, ""),
                n_heads=site.n_heads,
                n_key_value_heads=site.n_key_value_heads,
                notes=_notes(lens, site, z_differs=differs, sinks=layer in sinks),
            )
        )
    notes: list[str] = []
    if off and lens.has_experts:
        notes.append(
            "the loss is not smooth near these tokens, as happens in a mixture of experts, whose "
            "routing jumps: the maps tell what the smallest edits do, not those tried here"
        )
    if folded:
        notes.append("value biases are folded into output biases: masking heads leaves them behind")
    front = default_front(lens)
    notes += _notes_on_front(front)
    if trial.unknown_scales:
        notes.append("the softmax scale of some layers is unknown: give softmax_scale=")
    return ModelReport(
        model=lens.name,
        model_class=lens.kind,
        reads=lens.reads,
        dtype=str(lens.dtype).removeprefix("torch."),
        sites=tuple(rows),
        logits_error=error,
        padded_left=padded.get("left"),
        padded_right=padded.get("right"),
        prepended=None if front is None else front.token,
        tokenizer_prepends=None if front is None else front.own,
        prepends_chat_token=front is not None and front.is_chat_token,
        problems=tuple(problems),
        notes=tuple(notes),
    )


# ---- what is run ---------------------------------------------------------------------------------


class _Trial:
    """A model, and the few tokens that it is tried on."""

    def __init__(self, lens: Lens, prompt: PromptInput | None, prepend_bos: PrependBos) -> None:
        def spread(n: int) -> tuple[int, ...]:
            step = max(1, lens.d_vocab // (7 * n + 3))
            return tuple((i * 7 + 3) * step % lens.d_vocab for i in range(n))

        self.lens = lens
        self.allowed = _OF_DTYPE.get(lens.dtype, _Tolerances())
        self.unknown_scales = {i: 1.0 for i, site in lens.sites.items() if site.scale is None}
        given = (spread(min(_LENGTH, lens.n_ctx)),)
        if prompt is not None:
            given = read_prompts(lens, prompt, prepend_bos=prepend_bos).ids
        lengths = sorted(map(len, given))
        if lengths[0] != lengths[-1]:
            raise BadInput(
                f"found prompts of {lengths[0]} to {lengths[-1]} tokens; check_model reads one, or "
                "several of one length. Give one."
            )
        self.prompts, self.decoder = _read_as_they_are(given), None
        if lens.reads == "input, then answer":
            start = read_decoder_prompts(lens, None, 1).ids[0]
            row = (*start, *spread(_DECODER_LENGTH - 1))
            self.decoder = _read_as_they_are((row,) * len(given))

    def _laid_out(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """Tokens and mask of what predicts, and of an encoder's input."""
        reads = [self.prompts] if self.decoder is None else [self.decoder, self.prompts]
        sides = [read.lay_out(self.lens).model_input for read in reads]
        return sides[0], sides[1] if len(sides) > 1 else None

    def look(self) -> tuple[dict[str, Tensor], Tensor]:
        """What the hook points of patterns, values and z show, by name, and all logits."""
        sites = self.lens.sites.values()
        names = [n for s in sites for n in (s.pattern_name, s.value_name, s.z_name)]
        keep = {name: torch.clone for name in names if self.lens.has(name)}
        read, encoded = self._laid_out()
        try:
            return self.lens.look(keep, *read, encoded=encoded)
        except RALensError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"a forward pass of {self.lens.name} fails in TransformerLens or Hugging Face "
                f"itself: {type(error).__name__}: {error}. Try another version of TransformerLens."
            ) from error

    @torch.no_grad()
    def loss(self, hooks: FwdHooks) -> float:
        """The loss with hooks on the model."""
        read, encoded = self._laid_out()
        return float(_loss(self.lens.logits_at(*read, fwd_hooks=hooks, encoded=encoded)).sum())

    def run(self, prompts: Prompts, **options: Any) -> RACache:
        """The maps of these prompts."""
        decoder = None if self.decoder is None else [list(self.decoder.ids[0])]
        with offering():
            _, cache = run_with_ra(
                self.lens.module,
                prompts,
                decoder_input=decoder,
                softmax_scale=self.unknown_scales or None,
                progress=False,
                **options,
            )
        return cache

    def logits_error(self, logits: Tensor) -> float | None:
        """Relative difference from the logits of the Hugging Face model inside, if there is one."""
        decoder = None if self.decoder is None else torch.tensor(self.decoder.ids)
        own = self.lens.huggingface_logits(torch.tensor(self.prompts.ids), decoder)
        if own is None:
            return None
        # Constants added to all logits, as centring does, are no difference.
        found, wanted = (t.double().cpu().log_softmax(dim=-1) for t in (logits, own))
        return float((found - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm())

    def refusals(self, cache: RACache) -> dict[int, str]:
        """Why layers cannot be edited that only show their pattern."""
        refused: dict[int, str] = {}
        for layer, site in cache.sites.items():
            if site.observe_only:
                try:
                    self.loss(_patches(cache, [layer], _EDITS[0]))
                except UnsupportedModel as refusal:
                    refused[layer] = str(refusal)
        return refused

    def what_edits_do(self, cache: RACache, layers: list[int]) -> list[str]:
        """Whether an edit of the patterns and its opposite change the loss as the maps say."""
        if not layers or any(cache.sites[layer].repeated for layer in layers):
            return []  # the maps are of the last time a layer runs, and edits are made each time
        noise = self.allowed.change * float(cache.loss.abs().sum())
        measured = predicted = 0.0
        for size in _EDITS:
            up, down = (self.loss(_patches(cache, layers, edit)) for edit in (size, -size))
            measured = (up - down) / 2
            predicted = sum(
                _step(cache["ra", layer], size / len(layers))
                * float((cache["ra", layer] * cache["pattern_grad", layer]).double().sum())
                for layer in layers
            )
            if abs(measured - predicted) <= 0.2 * abs(predicted) + noise:
                return []
        return [
            f"a small edit of the patterns changed the loss by {measured:.3g} instead of "
            f"{predicted:.3g}, as the maps say: do not trust maps or patches here."
        ]

    def padding(self) -> tuple[dict[PaddingSide, Padded], list[str]]:
        """How the prompt and a shorter one run together, and whether their maps are those alone."""
        row = self.prompts.ids[0]
        rows = (row, row[: -(-len(row) // 2)])
        routes: dict[PaddingSide, Padded] = {}
        problems: list[str] = []
        if len(rows[1]) == len(row):
            return routes, problems
        asked: dict[str, Any] = {"target": row[0], "position": -1}
        alone = [self.run(_read_as_they_are((one,)), **asked) for one in rows]
        for side in _SIDES:
            prompts = Prompts(rows, None, side)
            decoder = None if self.decoder is None else self.decoder.chosen([0, 0])
            sides = (prompts, None) if decoder is None else (decoder, prompts)
            hidden = padding_is_hidden(self.lens, *sides)
            routes[side] = "together" if hidden else "by length"
            error = _worst(self.run(prompts, **asked), alone)
            if not error < self.allowed.padded:
                problems.append(
                    f"R of a prompt changes by {error:.0%} in a batch padded on the {side}: run "
                    "prompts of one length at a time."
                )
        return routes, problems


def _read_as_they_are(rows: tuple[tuple[int, ...], ...]) -> Prompts:
    return Prompts(rows, None, "right")


def _loss(logits: Tensor) -> Tensor:
    """Mean of −log p over all tokens: unlike that of one token it is never near its end."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -wide[:, -1].log_softmax(dim=-1).mean(dim=-1)


def _patches(cache: RACache, layers: Sequence[int], size: float) -> list[Any]:
    return [
        hook
        for layer in layers
        for hook in patch_hooks(
            {layer: cache["ra", layer]},
            cache.sites,
            scale=_step(cache["ra", layer], size / len(layers)),
        )
    ]


def _step(value: Tensor, size: float) -> float:
    largest = float(value.abs().max())
    return size / largest if largest > 0 else 0.0


def _worst(together: RACache, alone: Sequence[RACache]) -> float:
    """Largest relative error of R in a batch, of the examples that also ran alone."""
    errors: list[Tensor] = []
    sizes: list[Tensor] = []
    for i, (one, start) in enumerate(zip(alone, together.info.starts or (), strict=True)):
        for layer, site in together.sites.items():
            wanted = one["ra", layer][0]
            sides = zip((site.query_side, site.key_side), wanted.shape[-2:], strict=True)
            firsts = [(start if side == "input" else 0, n) for side, n in sides]
            rows, columns = (slice(first, first + n) for first, n in firsts)
            errors.append((together["ra", layer][i, :, rows, columns] - wanted).norm().cpu())
            sizes.append(wanted.norm().cpu())  # numbers, of layers on whatever device
    # Where R is next to nothing its rounding is not.
    size = torch.stack(sizes)
    size = size.clamp(min=max(1e-3 * float(size.max()), torch.finfo(size.dtype).tiny))
    return float((torch.stack(errors) / size).max())


# ---- what is said --------------------------------------------------------------------------------


def _notes(lens: Lens, site: Site, *, z_differs: bool, sinks: bool) -> tuple[str, ...]:
    told = {
        "rows sum to less than 1 (attention sinks)": sinks,
        f"gated ({site.gate})": site.gate is not None,
        "z is not pattern times values: gated, normalised or clipped": z_differs,
        f"window of {site.window}": site.window is not None,
        "runs several times: maps of the last, patches each time": site.repeated,
        "both directions": not site.causal and not site.cross,
    }
    return (*lens.remarks(site), *(note for note, holds in told.items() if holds))


def _z_differs(site: Site, shown: Mapping[str, Tensor]) -> float:
    """Error of pattern times values relative to z; 0 where it cannot be told."""
    names = (site.pattern_name, site.value_name, site.z_name)
    seen = [shown[name].double() for name in names if name in shown]
    if len(seen) < len(names) or seen[1].ndim != 4:
        return 0.0
    pattern, values, z = seen
    n_keys = pattern.shape[-1]
    if values.shape[1] != n_keys and values.shape[2] == n_keys:
        values = values.transpose(1, 2)  # latent attention shows [batch, head, key, d_head]
    if values.shape[1] != n_keys or site.n_heads % values.shape[2]:
        return 0.0
    z, product = by_head(z, site.n_heads), attention_output(pattern, values)
    return float((product - z).norm() / z.norm()) if product.shape == z.shape else 0.0
