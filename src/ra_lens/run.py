"""`run_with_ra`: one forward pass, one backward pass, nothing left behind on the model.

Cost: about one forward pass without the unembedding, and one backward pass from the positions read
down to the first layer asked for, with respect to activations only. Parameters get no gradient;
logits are computed where the loss reads them. Before a model's first padded batch there are three
forward passes of one or two prompts (`ra_lens.padding`).

Each example has its own loss and the losses are summed, so an example's maps do not depend on the
batch it ran in.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.collect import Collector, Store
from ra_lens.errors import BadInput, NothingToDifferentiate, RALensWarning, one_of
from ra_lens.half import LossScale
from ra_lens.hooks import NamesFilter, Recorder, wanted
from ra_lens.inputs import Given, Mask
from ra_lens.memory import Plan, largest_batch, refuse_what_cannot_fit
from ra_lens.model import FwdHooks, Layers, Lens, PrependBos, Side, as_lens
from ra_lens.model.backward import BACKWARDS, Backward
from ra_lens.model.forward import at_columns
from ra_lens.model.sites import VectorKind, read_vectors
from ra_lens.numbers import Real, Whole, whole_or_none
from ra_lens.padding import (
    BatchResult,
    PaddingShows,
    of_one_length,
    padding_is_hidden,
    places,
    run_by_length,
    watched,
)
from ra_lens.prompts import (
    Batch,
    PaddingSide,
    PromptInput,
    Prompts,
    read_decoder_prompts,
    read_prompts,
)
from ra_lens.rows import read_rows
from ra_lens.run_info import RunInfo
from ra_lens.targets import Answers, Loss, Metric, Objective, Position, as_objective
from ra_lens.tensors import read_device, read_dtype, read_numbers


def run_with_ra(
    model: nn.Module,
    input: PromptInput,
    *,
    target: Answers | Objective | None = None,
    metric: Metric | Objective | None = None,
    position: Position | None = None,
    layers: Layers = None,
    names_filter: NamesFilter = None,
    store: Store = "maps",
    vectors: bool | str | Sequence[str] = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]] = (),
    return_logits: Literal["read", "all"] = "read",
    batch_size: Whole | Literal["auto"] | None = None,
    recompute: bool = False,
    backward: Backward = "exact",
    query_rows: Whole | None = None,
    progress: bool = True,
    attention_mask: Mask | None = None,
    prepend_bos: PrependBos = None,
    padding_side: PaddingSide | None = None,
    decoder_input: Given | None = None,
    softmax_scale: Real | Mapping[int, Real] | None = None,
) -> tuple[Float[Tensor, "batch read d_vocab"], RACache]:
    """Run a model on prompts and collect the Reversed Attention of every head.

    Works inside `torch.no_grad()`, with frozen parameters, and beside hooks that are already on
    the model or given in `fwd_hooks`: R is then the gradient of the intervened model. One run at a
    time per model, whatever the thread. In float16 the loss is scaled by a power of two, which your
    own hooks on gradients see, and the maps are divided by it.

    Args:
        model: A HookedTransformer or TransformerBridge, in eval mode if it has dropout.
        input: A prompt, several prompts (padded as the tokenizer pads), or token ids: one row, or
            `[batch, pos]`, as a tensor, an array or lists. Or what a tokenizer gives
            (`BatchEncoding`, any mapping with `input_ids`), whose mask is used. Where padding would
            change what the model computes, prompts run in groups of one length
            (`ra_lens.padding`); what is returned is laid out the same.
        target: What the loss is −log p of: text, a token id, or one of either per example. Text
            of several tokens is appended to the prompt and the loss is the mean over its tokens
            (if one of several answers is such, all are appended). Rows of ids, `[batch, k]`, are
            answers of k tokens each, without BOS: `model.to_tokens(text, prepend_bos=False)`.
            Or an objective from `ra_lens.targets`. Neither target nor metric: the model's own top
            prediction.
        metric: Instead of a target: any function of all logits (`[batch, pos, d_vocab]`) that
            gives `[batch]` or a scalar, differentiated as it is; something descent should lower.
            Texts of different lengths are then padded on the left, so that `logits[:, -1]` is the
            last token of each.
        position: Where to read, within each prompt (negative: from its end); one for all or one
            per prompt. Default: the last token. Models that read in both directions (BERT)
            predict the token at the position itself; the default is then the prompt's mask token.
        layers: Layers to collect; negative counts from the end. Default: all. The backward pass
            stops at the first of them.
        names_filter: As in TransformerLens: which maps to keep, by full name
            (`blocks.5.attn.hook_ra`, `….hook_pattern`, `….hook_pattern_grad`). Default: all three.
        store: `"maps"`; `"norms"`, which drops each map once its norms are taken; or `"mean"`,
            which keeps only the running mean over the examples.
        vectors: Keep also, of every token, queries, keys, values, what heads give, and the
            gradients there: True for all kinds, or names (`"query"`, `["value", "value_grad"]`),
            read as `ra["query", 5]`. See `ra_lens.vectors`. Not with `store="mean"`.
        device: Where to keep maps and logits. Default: where they are made; in a model over several
            devices each map on that of its layer.
        dtype: In what to keep them, a floating-point dtype. Default: float32 (float64 for a float64
            model); R is computed in that before it is converted.
        fwd_hooks: TransformerLens hooks for this run, as in `run_with_hooks`. Where prompts run in
            groups of one length, they get one group at a time (with a metric of your own: twice),
            without padding, and a warning says so.
        return_logits: `"read"`: logits at the positions the loss reads, `[:, -1]` being the last
            of them (for a metric of your own: at the last token). `"all"`: at every position; those
            at padding mean nothing.
        batch_size: Run so many prompts at a time, with a progress bar if there are several
            batches. Default: all at once. `"auto"`: as many as fit what the model's devices have
            free, by what `ra_lens.memory` counts and room for what it does not; all where they do.
        recompute: Keep the attention tensors of one layer at a time, for long prompts: each block
            runs again in the backward pass (activation checkpointing). Same maps; one more forward
            pass; hooks inside blocks run twice.
        backward: `"exact"`, the gradient of the loss; or another backward pass through the same
            forward pass, `"relp"` or `"gim"`, whose rules `ra_lens.model.backward` states. Maps and
            gradients are then those of that pass, which the cache says (`ra.info.backward`), and
            foretell no change of the loss. Logits and patterns are the same.
        query_rows: With `recompute=True` and `store="norms"`: run a layer's attention in blocks of
            so many queries, so that no whole map is ever held and memory grows linearly with the
            prompt. Same norms but for rounding (`ra_lens.model.rows`). Default: all at once while
            a layer's map has less than 67 million entries, then blocks of that size, where model
            and prompts allow it: causal, of one length, no hooks of yours.
        progress: False hides the progress bar.
        attention_mask: For token ids with padding: 1 at real tokens; it wins over the mask of a
            mapping. Without either, runs of the tokenizer's pad token at the end (or start) of rows
            of a batch count as padding; rows of different lengths have none.
        prepend_bos: What stands in front of text. None: what TransformerLens prepends by default;
            True: the tokenizer's BOS; False: nothing, as for text that brings its own BOS, such as
            that of a chat template; or a token as text, such as `"<|endoftext|>"`, in place of BOS.
        padding_side: Overrides the tokenizer's side.
        decoder_input: For encoder-decoders, whose encoder reads `input`: what the decoder has read
            before the target. Token ids are read as they are, less what their own mask calls
            padding; text comes after the model's start token. Default: the start token alone. A
            target is predicted by its last token, one of several tokens is appended to it, and
            `position` counts within it.
        softmax_scale: In place of what the model says of the factor between q·k and the scores; one
            number, or by layer. Only needed where that is unknown; 1.0 gives the gradient with
            respect to the scores.

    Returns:
        The logits, `[batch, read, d_vocab]`, without graph; and the `RACache`.

    Raises:
        BadInput: input, target or option that cannot be used.
        UnsupportedModel: a model, or a state of it, that does not let its attention be read; or
            one that is being run already, or that computes something `backward` has no rule for.
        NothingToDifferentiate: NaN logits or gradients, a loss that does not depend on the
            attention, or layers that the model itself, and no hook, cuts off from it.
        NotEnoughMemory: more than a device has left, seen before anything runs.
    """
    one_of("store", store, ("maps", "norms", "mean"))
    one_of("return_logits", return_logits, ("read", "all"))
    one_of("backward", backward, BACKWARDS)
    one_of("padding_side", padding_side, (None, "left", "right"))
    lens = as_lens(model)
    lens.refuse_meta()
    lens.refuse_inference_mode()
    lens.refuse_dropout()
    lens.refuse_checkpointing()
    device, dtype = read_device(device), read_dtype(dtype)
    sites = lens.sites.choose(layers).with_scales(softmax_scale)
    kinds = read_vectors(vectors)
    if kinds and store == "mean":
        raise BadInput("found vectors with store='mean', which keeps maps only; use store='norms'.")
    _check_hook_names(lens, fwd_hooks)
    objective = as_objective(target, metric)
    prompts = read_prompts(
        lens,
        input,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
    )
    at_a_time = None if batch_size == "auto" else whole_or_none("batch_size", batch_size)
    if at_a_time is not None and at_a_time < 1:
        raise BadInput(f"found batch_size={at_a_time}; give a positive number, 'auto', or None.")
    encoded = None
    if lens.reads == "input, then answer":
        if prompts.texts is not None and padding_side is None:
            # Where most count their positions right, so that all run in one batch.
            prompts = replace(prompts, padding_side="right")
        encoded, prompts = prompts, read_decoder_prompts(lens, decoder_input, len(prompts))
    elif decoder_input is not None:
        raise BadInput(f"found decoder_input, but {lens.name} has no decoder beside its encoder.")
    bound, prompts = objective.bind(lens, prompts, position)
    for one in (prompts, encoded or prompts):
        if store == "mean" and len(set(one.lengths)) > 1:
            raise BadInput(
                f"found prompts of {min(one.lengths)} to {max(one.lengths)} tokens with "
                "store='mean'; a mean adds position to position, so all must have the same length. "
                "Group the prompts by length first."
            )
    if bound.positions is None and len(set(prompts.lengths)) > 1:
        prompts = _for_a_metric(prompts, padding_side)
    read, every = _Read(prompts, encoded), return_logits == "all"
    if store == "maps" or every:  # what is joined afterwards needs one width
        read = read.each(Prompts.widened)
    half = lens.in_float16
    is_wanted = wanted(names_filter, sites)
    plan = Plan(
        lens=lens,
        sites=sites,
        prompts=read.prompts,
        encoded=read.encoded,
        batch_size=at_a_time,
        store=store,
        wanted=is_wanted,
        device=device,
        dtype=dtype,
        recompute=recompute,
        vectors=kinds,
    )
    if batch_size == "auto":
        plan = replace(plan, batch_size=_fitting(plan, bound, every=every))
    edited = bool(fwd_hooks) or lens.is_hooked
    plan = replace(plan, rows=read_rows(plan, query_rows, edited=edited))
    refuse_what_cannot_fit(plan)
    recorder = Recorder(sites, store, is_wanted, device, dtype, again=half)
    run = _Run(
        lens,
        fwd_hooks,
        recorder,
        LossScale(in_float16=half),
        padding_is_hidden=padding_is_hidden(lens, read.prompts, read.encoded),
        every=every,
        recompute=recompute,
        rows=plan.in_rows,
        vectors=kinds,
        backward=backward,
    )
    parts = [examples for examples, _ in read.prompts.batches(plan.batch_size)]
    with lens.only_run():
        results = [
            run.part(read.each(lambda one, part=part: one.chosen(part)), bound.part(part))
            for part in _with_progress(parts, show=progress and len(parts) > 1)
        ]
    return _finish(lens, bound, read, recorder, results, backward)


def _fitting(plan: Plan, bound: Loss, *, every: bool) -> int | None:
    """The most prompts that may run at a time; None: all."""
    width, positions = plan.widths["decoder"], bound.positions
    of_target = 1 if positions is None else max(map(len, positions))
    return largest_batch(
        plan,
        n_read=width if every or positions is None else of_target,
        n_kept=width if every else of_target,
    )


@dataclass(frozen=True)
class _Read:
    """What the model reads; in an encoder-decoder `prompts` is for the decoder."""

    prompts: Prompts
    encoded: Prompts | None

    @property
    def source(self) -> Prompts:
        """What the user's prompts are."""
        return self.encoded or self.prompts

    def each(self, change: Callable[[Prompts], Prompts]) -> _Read:
        return _Read(change(self.prompts), None if self.encoded is None else change(self.encoded))

    def lay_out(self, lens: Lens) -> tuple[Batch, Batch | None]:
        encoded = None if self.encoded is None else self.encoded.lay_out(lens)
        return self.prompts.lay_out(lens), encoded


@dataclass(frozen=True)
class _Run:
    """How the batches of a run are run."""

    lens: Lens
    fwd_hooks: FwdHooks
    recorder: Recorder
    scaling: LossScale
    padding_is_hidden: bool
    every: bool
    recompute: bool
    rows: int | None
    vectors: frozenset[VectorKind]
    backward: Backward

    def part(self, read: _Read, bound: Loss) -> BatchResult:
        """Run a batch as it is laid out or, where padding would show, in groups of one length."""
        padded = read.prompts.is_padded or read.source.is_padded
        if self.padding_is_hidden or not padded:
            try:
                return self._batch(read, bound)
            except PaddingShows:  # through a hook of the user's; nothing has been delivered yet
                pass
        if self.fwd_hooks or self.lens.has_hooks:
            warnings.warn(
                f"padding changes what {self.lens.name} computes here, so these prompts run in "
                "groups of one length: hooks get one group at a time, without padding.",
                RALensWarning,
                stacklevel=4,
            )
        groups = of_one_length(read.prompts, read.encoded)
        wide = read.each(Prompts.widened)

        def of(group: Sequence[int]) -> _Read:
            return wide.each(lambda one: one.chosen(group))

        result = run_by_length(
            groups,
            bound,
            run=lambda group, objective: self._batch(of(group), objective, unpadded=True),
            logits_of=lambda group: self._logits(of(group)),
            loss_of=lambda logits: _checked_loss(bound, logits, len(read.prompts)),
        )
        self.recorder.regroup(len(groups), places(groups))
        return result

    def _batch(self, read: _Read, bound: Loss, *, unpadded: bool = False) -> BatchResult:
        """Run a batch forwards and backwards; again where float16 cannot hold its gradients.

        What is checked is read when all of it is under way, so that a GPU is waited for once.
        """
        while True:
            result, checks = self._differentiate(read, bound, unpadded=unpadded)
            of_layers = self.recorder.largest_gradients()
            nan, infinite, reached, *norms = read_numbers([*checks, *of_layers.values()])
            if nan:
                self.lens.refuse_nan(result.logits)
            if infinite:
                _refuse_infinite(result.loss)
            largest = dict(zip(of_layers, norms, strict=True))
            if all(map(math.isfinite, largest.values())) or not self.scaling.lower():
                break
        _check_gradients(self.lens, largest, reached, edited=self._edited)
        self.recorder.end()
        return result

    @property
    def _edited(self) -> bool:
        """Whether hooks may change what the model computes."""
        return bool(self.fwd_hooks) or self.lens.is_hooked

    def _differentiate(
        self, read: _Read, bound: Loss, *, unpadded: bool
    ) -> tuple[BatchResult, list[Tensor]]:
        """Hand maps to the recorder; gives what is to be checked beside the rest.

        That is whether logits read are NaN, whether a loss is infinite or NaN, and the largest
        gradient at the logits.
        """
        lens = self.lens
        layout, encoder_layout = read.lay_out(lens)
        batch, encoded = layout, encoder_layout
        if unpadded:  # all of one length; what comes back is laid out with padding all the same
            batch, encoded = read.each(Prompts.unpadded).lay_out(lens)
        columns = batch.last if bound.positions is None else batch.columns(bound.positions)
        at_logits: list[Tensor] = []
        deliver = self.recorder.begin(layout, encoder_layout, in_rows=self.rows is not None)
        collector = Collector(
            lens,
            self.recorder.sites,
            deliver,
            edited=self._edited,
            vectors=self.vectors,
            backward=self.backward,
        )
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(lens.parameters_frozen())
            stack.enter_context(lens.tensors_put_back())
            needed = None if self.every or bound.positions is None else columns
            in_pieces = self.rows is not None
            whole = stack.enter_context(lens.running(needed, self.fwd_hooks, in_pieces=in_pieces))
            past = stack.enter_context(collector.attached(recompute=self.recompute, rows=self.rows))
            if batch.is_padded:
                stack.enter_context(lens.fully_masked_rows_apart())
            with watched(lens, batch, encoded):
                logits = lens.forward(*batch.model_input, encoded and encoded.model_input, past)
            at_read = at_columns(logits, columns) if whole else logits
            logits = layout.spread(logits, 1) if whole else logits
            given = logits if bound.positions is None else at_read
            loss = self._loss(bound, given, at_read)
            total = loss.sum()
            scale = self.scaling.of(total, given)
            if given.requires_grad:
                collector.rewire([given])
                given.register_hook(lambda grad: at_logits.append(grad.norm(p=math.inf)))
            collector.backward(total, scale)
        if collector.vectors is not None:
            sides: dict[Side, Batch] = {"input": encoder_layout or layout, "decoder": layout}
            for site, found in collector.vectors.found(scale):
                self.recorder.receive_vectors(site, found, sides)
        kept = (logits if self.every else at_read).detach().to(self.recorder.device)
        starts = (encoder_layout or layout).starts
        checks = [
            at_read.detach().isnan().any(),
            ~loss.detach().isfinite().all(),
            at_logits[0] / scale if at_logits else torch.zeros(()),
        ]
        return BatchResult(kept, loss.detach(), starts, bound.targets), checks

    def _loss(self, bound: Loss, given: Tensor, at_read: Tensor) -> Tensor:
        try:
            return _shaped_loss(bound, given, len(given))
        except Exception:
            self.lens.refuse_nan(at_read)  # what a metric stumbles over
            raise

    @torch.no_grad()
    def _logits(self, read: _Read) -> Float[Tensor, "group pos d_vocab"]:
        """Logits of prompts of one length, run without padding and laid out with it."""
        batch, encoded = read.each(Prompts.unpadded).lay_out(self.lens)
        source = encoded and encoded.model_input
        logits = self.lens.logits_at(*batch.model_input, None, self.fwd_hooks, source)
        return read.prompts.lay_out(self.lens).spread(logits, 1)


def _check_gradients(
    lens: Lens, largest: dict[int, float], at_logits: float, *, edited: bool
) -> None:
    infinite = [layer for layer, norm in largest.items() if not math.isfinite(norm)]
    if infinite:
        raise NothingToDifferentiate(
            f"the gradient at the pattern of layer {max(infinite)} of {lens.name} is NaN or "
            "infinite. Check the metric (its derivative, too, must be finite) and hooks; for "
            "float16 models try bfloat16 or float32."
        )
    # Squares of less than 1e-23 are 0, so that a norm of 0 says nothing about a loss that small.
    if not edited and at_logits > 1e-12 and not any(largest.values()):
        raise NothingToDifferentiate(
            f"the gradient is 0 everywhere from layer {max(largest)} on down, although it is not "
            "at the logits and no hook on the model cuts it off: the model itself does, as a "
            "module that rounds to integers, or these heads write nothing. Load the model in "
            "floating point, or give other layers=."
        )


def _for_a_metric(prompts: Prompts, padding_side: PaddingSide | None) -> Prompts:
    """Lay prompts of different lengths out so that a metric finds their last tokens together."""
    if prompts.padding_side == "left":
        return prompts
    if prompts.texts is not None and padding_side is None:
        return replace(prompts, padding_side="left")
    warnings.warn(
        "the prompts have different lengths and are padded on the right: for the shorter ones "
        "logits[:, -1] is padding. Use padding_side='left' with text, or let the metric index "
        "each example's own last token.",
        RALensWarning,
        stacklevel=3,
    )
    return prompts


def _checked_loss(bound: Loss, logits: Tensor, n: int) -> Tensor:
    loss = _shaped_loss(bound, logits, n)
    _refuse_infinite(loss)
    return loss


def _shaped_loss(bound: Loss, logits: Tensor, n: int) -> Tensor:
    loss: object = bound(logits)
    if not isinstance(loss, Tensor) or loss.ndim > 1 or (loss.ndim == 1 and loss.shape[0] != n):
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(
            f"the metric gave {found}; one value per example (a tensor of shape [{n}]) or a "
            "scalar tensor is needed."
        )
    return loss


def _refuse_infinite(loss: Tensor) -> None:
    if not bool(loss.detach().isfinite().all()):
        raise NothingToDifferentiate(
            f"the loss is {loss.detach().flatten().tolist()[:8]}; a finite value per example is "
            "needed. Check the metric, or give a target that the model can predict."
        )


def _finish(
    lens: Lens,
    bound: Loss,
    read: _Read,
    recorder: Recorder,
    results: list[BatchResult],
    backward: Backward,
) -> tuple[Tensor, RACache]:
    scalars = [r for r in results if r.loss.ndim == 0]
    if scalars and len(results) > 1:
        raise BadInput(
            f"the metric gave one scalar for each of {len(results)} batches, and their sum would "
            "depend on batch_size. Give one value per example, or leave batch_size out."
        )
    targets = tuple(lens.decode_text(row) for r in results for row in r.targets or [])
    info = RunInfo(
        model_name=lens.name,
        n_layers=lens.sites.n_layers,
        objective=bound.kind,
        targets=targets or None,
        wrong=None if bound.wrong is None else tuple(map(lens.decode, bound.wrong)),
        target_is_top_prediction=bound.kind == "top_prediction",
        str_tokens=_decoded(lens, read.source),
        answer_lengths=bound.answer_lengths,
        starts=tuple(start for r in results for start in r.starts),
        prepended=read.source.prepended,
        decoder_tokens=None if read.encoded is None else _decoded(lens, read.prompts),
        backward=backward,
    )
    loss = results[0].loss if scalars else torch.cat([r.loss for r in results])
    return torch.cat([r.logits for r in results]), recorder.result(loss=loss, info=info)


def _decoded(lens: Lens, prompts: Prompts) -> tuple[tuple[str, ...], ...]:
    return tuple(map(lens.decode_each, prompts.ids))


def _check_hook_names(lens: Lens, fwd_hooks: FwdHooks) -> None:
    # TransformerBridge 3.9 ignores a name that does not exist.
    for name, _ in fwd_hooks:
        if isinstance(name, str) and name not in lens.hook_points:
            close = difflib.get_close_matches(name, list(lens.hook_points), n=3)
            raise BadInput(
                f"there is no hook point {name!r} in {lens.name}. "
                f"Did you mean {' or '.join(map(repr, close)) or 'one of model.hook_dict'}?"
            )


def _with_progress(parts: list[Any], *, show: bool) -> Iterable[Any]:
    if not show:
        return parts
    from tqdm.auto import tqdm

    return tqdm(parts, desc="Reversed Attention", unit="batch")
