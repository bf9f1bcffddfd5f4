"""`run_with_ra`: one forward pass, one backward pass, nothing left behind on the model.

Cost: about one forward pass without the unembedding, and one backward pass from the positions read
down to the first layer asked for, with respect to activations only. Parameters get no gradient;
logits are computed where the loss reads them.

Each example has its own loss and the losses are summed, so an example's maps do not depend on the
batch it ran in.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.binding import bind
from ra_lens.cache import RACache, Store
from ra_lens.cache_info import RunInfo, spell_layers
from ra_lens.collect import Collector
from ra_lens.errors import BadInput, NothingToDifferentiate
from ra_lens.prompts import Batch, PaddingSide, Prompts, read_prompts
from ra_lens.record import NamesFilter, Recorder, keeps
from ra_lens.sites import Lens, Site, as_lens
from ra_lens.targets import Bound, Metric, Objective, Position, Token, as_objective

Layers = int | Iterable[int] | None


def run_with_ra(
    model: nn.Module,
    input: str | Sequence[str] | Tensor,
    *,
    target: Token | Sequence[Token] | Tensor | Objective | None = None,
    metric: Metric | Objective | None = None,
    position: Position | None = None,
    layers: Layers = None,
    names_filter: NamesFilter = None,
    store: Store = "maps",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]] = (),
    return_logits: Literal["read", "all"] = "read",
    batch_size: int | None = None,
    progress: bool = True,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> tuple[Float[Tensor, "batch read d_vocab"], RACache]:
    """Run a model on prompts and collect the Reversed Attention of every head.

    Works inside `torch.no_grad()`, with frozen parameters, and beside hooks that are already on
    the model or given in `fwd_hooks`: R is then the gradient of the intervened model.

    Args:
        model: A HookedTransformer or TransformerBridge, in eval mode if it has dropout.
        input: A prompt, several prompts (padded as the tokenizer pads), or token ids
            (`Int[Tensor, "batch pos"]`).
        target: What the loss is −log p of: text, a token id, or one of either per example. Text
            of several tokens is appended to the prompt and the loss is the mean over its tokens.
            Or an objective from `ra_lens.targets`. Neither target nor metric: the model's own top
            prediction.
        metric: Instead of a target: any function of all logits (`[batch, pos, d_vocab]`) that
            gives `[batch]` or a scalar, differentiated as it is; something descent should lower.
        position: Where to read, within each prompt (negative: from its end); one for all or one
            per prompt. Default: the last token.
        layers: Layers to collect; negative counts from the end. Default: all. The backward pass
            stops at the first of them.
        names_filter: As in TransformerLens: which maps to keep, by full name
            (`blocks.5.attn.hook_ra`, `….hook_pattern`, `….hook_pattern_grad`). Default: all three.
        store: `"maps"`; `"norms"`, which drops each map once its norms are taken; or `"mean"`,
            which keeps only the running mean over the examples.
        device: Where to keep the maps. Default: where they are made.
        dtype: In what to keep them. Default: float32 (float64 for a float64 model); R is computed
            in that before it is converted.
        fwd_hooks: TransformerLens hooks for this run, as in `run_with_hooks`.
        return_logits: `"read"`: logits at the positions the loss reads, `[:, -1]` being the last
            of them. `"all"`: at every position. A metric of your own always gets all.
        batch_size: Run so many prompts at a time, with a progress bar if there are several
            batches. Default: all at once.
        progress: False hides the progress bar.
        attention_mask: For token ids with padding: 1 at real tokens.
        prepend_bos: For text: overrides the model's default.
        padding_side: Overrides the tokenizer's side.

    Returns:
        The logits, `[batch, read, d_vocab]`, without graph; and the `RACache`.

    Raises:
        BadInput: input, target or option that cannot be used.
        UnsupportedModel: a model, or a state of it, that does not let its attention be read.
        NothingToDifferentiate: NaN logits, or a loss that does not depend on the attention.
    """
    _one_of("store", store, ("maps", "norms", "mean"))
    _one_of("return_logits", return_logits, ("read", "all"))
    _one_of("padding_side", padding_side, (None, "left", "right"))
    lens = as_lens(model)
    lens.refuse_inference_mode()
    lens.refuse_dropout()
    sites = choose_layers(lens, layers)
    _check_hook_names(lens, fwd_hooks)
    objective = as_objective(target, metric)
    prompts = read_prompts(
        lens,
        input,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
    )
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"found batch_size={batch_size}; give a positive number, or None.")
    bound, prompts = bind(objective, lens, prompts, position)
    if store == "mean" and len(set(prompts.lengths)) > 1:
        raise BadInput(
            f"found prompts of {min(prompts.lengths)} to {max(prompts.lengths)} tokens with "
            "store='mean'; a mean adds position to position, so all must have the same length. "
            "Group the prompts by length first."
        )
    all_logits = return_logits == "all" or bound.positions is None
    if store == "maps" or all_logits:  # what is joined afterwards needs one width
        prompts = replace(prompts, width=max(prompts.width, *prompts.lengths))
    recorder = Recorder(sites, store, keeps(names_filter, sites), device, dtype)
    parts = list(prompts.batches(batch_size))
    results = [
        _run_batch(lens, part, bound.part(examples), list(fwd_hooks), recorder, all_logits)
        for examples, part in _with_progress(parts, show=progress and len(parts) > 1)
    ]
    return _finish(lens, bound, prompts, recorder, results)


@dataclass
class _BatchResult:
    logits: Tensor
    loss: Tensor
    batch: Batch
    targets: list[list[int]] | None


def _run_batch(
    lens: Lens,
    prompts: Prompts,
    bound: Bound,
    fwd_hooks: list[Any],
    recorder: Recorder,
    all_logits: bool,
) -> _BatchResult:
    batch = prompts.lay_out(lens)
    columns = None if bound.positions is None else batch.columns(bound.positions)
    collector = Collector(lens, recorder.sites, recorder.begin(batch))
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(lens.parameters_frozen())
        stack.enter_context(lens.hooks(fwd_hooks))
        stack.enter_context(collector.attached())
        stack.enter_context(lens.reading(None if all_logits else columns))
        logits = lens.forward(batch.tokens, batch.attention_mask)
        read = logits
        if columns is not None and all_logits:
            rows = torch.arange(logits.shape[0], device=logits.device).unsqueeze(1)
            read = logits[rows, columns.to(logits.device)]
        if bool(read.detach().isnan().any()):
            raise NothingToDifferentiate(
                f"the logits of {lens.name} contain NaN at the positions read. Check the weights "
                "and hooks; for float16 models try bfloat16 or float32."
            )
        loss = _checked_loss(bound, read, len(prompts))
        collector.backward(loss.sum())
    return _BatchResult(logits.detach(), loss.detach(), batch, bound.targets)


def _checked_loss(bound: Bound, logits: Tensor, n: int) -> Tensor:
    loss: object = bound.loss(logits)
    if not isinstance(loss, Tensor) or loss.ndim > 1 or (loss.ndim == 1 and loss.shape[0] != n):
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BadInput(
            f"the metric gave {found}; one value per example (a tensor of shape [{n}]) or a "
            "scalar tensor is needed."
        )
    if not bool(loss.detach().isfinite().all()):
        raise NothingToDifferentiate(
            f"the loss is {loss.detach().flatten().tolist()[:8]}; a finite value per example is "
            "needed. Check the metric, or give a target that the model can predict."
        )
    return loss


def _finish(
    lens: Lens, bound: Bound, prompts: Prompts, recorder: Recorder, results: list[_BatchResult]
) -> tuple[Tensor, RACache]:
    scalars = [r for r in results if r.loss.ndim == 0]
    if scalars and len(results) > 1:
        raise BadInput(
            f"the metric gave one scalar for each of {len(results)} batches, and their sum would "
            "depend on batch_size. Give one value per example, or leave batch_size out."
        )
    targets = tuple(
        "".join(lens.decode(token) for token in row) for r in results for row in r.targets or []
    )
    info = RunInfo(
        model_name=lens.name,
        n_layers=lens.n_layers,
        objective=bound.kind,
        targets=targets or None,
        wrong=None if bound.wrong is None else tuple(map(lens.decode, bound.wrong)),
        target_is_top_prediction=bound.kind == "top_prediction",
        str_tokens=tuple(tuple(lens.decode(token) for token in row) for row in prompts.ids),
        answer_lengths=bound.answer_lengths,
        starts=tuple(start for r in results for start in r.batch.starts),
        bos_prepended=prompts.bos_prepended,
    )
    loss = results[0].loss if scalars else torch.cat([r.loss for r in results])
    return torch.cat([r.logits for r in results]), recorder.result(loss=loss, info=info)


def choose_layers(lens: Lens, layers: Layers) -> dict[int, Site]:
    """Sites of the layers asked for, in layer order.

    Raises:
        BadInput: a layer without attention, or none.
    """
    if layers is None:
        return dict(lens.sites)
    wanted = [layers] if isinstance(layers, int) else list(layers)
    chosen = [layer + lens.n_layers if layer < 0 else layer for layer in wanted]
    unknown = [w for w, layer in zip(wanted, chosen, strict=True) if layer not in lens.sites]
    if unknown or not chosen:
        raise BadInput(
            f"found layers={unknown or wanted}; {lens.name} has attention at layers "
            f"{spell_layers(list(lens.sites))}. Give one or several of these; negative counts from "
            "the end."
        )
    return {layer: lens.sites[layer] for layer in sorted(set(chosen))}


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise BadInput(f"found {name}={value!r}; give one of {', '.join(map(repr, choices))}.")


def _check_hook_names(lens: Lens, fwd_hooks: Sequence[tuple[Any, Any]]) -> None:
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
