"""Do rankings point at heads that are known to do something? Circuits, and heads found exactly.

The prompts are those of a known circuit (`ra_lens.tasks.circuits`). Which heads are true is a
published list (`ra_lens.heads.known_heads`, of GPT-2 small), a list of your own, or found in the
model at hand by exact patching, as the heads that move the answer there: those

* whose exact effect is among the largest: what the answer's logit loses against the best other one
  when the head gives what it gives on the corrupted twin (`ra_lens.heads.head_effects`); and
* which look from the last token at what they have to carry there, such as the name of the indirect
  object, with at least some share of their attention.

Half of the prompts find the heads, the other half ranks them, so that no method is helped by having
seen the same prompts. How well a ranking finds them: `ra_lens.heads.localisation_scores`, by the
scores as they are, and by their sizes where some are below 0 (a circuit may have heads that hurt).

A ranking may be right and yet find few of these heads: the criterion knows nothing of the heads
before them, which many methods rank first. Overlap is no substitute for
`ra_lens.perturbation_test`.

Cost: that of each method's ranking, and for heads to be found that of the exact effects, on half of
the prompts each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from ra_lens.errors import BadInput
from ra_lens.experiments.facts import methods_facts, model_facts, prompts_hash
from ra_lens.experiments.journal import Journal, as_frame, finished_results, open_journal
from ra_lens.experiments.runner import Row, read_methods, refuse_hooks
from ra_lens.head_names import Heads, list_heads
from ra_lens.heads import HeadScores, head_effects, known_heads, localisation_scores, rank_heads
from ra_lens.heads.known import refuse_true_heads
from ra_lens.heads.registry import find_method
from ra_lens.model import Lens, PrependBos, as_lens
from ra_lens.model.sites import every_head
from ra_lens.numbers import BatchSize, Real, Whole, flag, read_batch_size, real, whole
from ra_lens.padding import batches, watched
from ra_lens.questions import ask, marked, read_questions
from ra_lens.tables import write_results
from ra_lens.tasks import Prompt, circuit_prompts, seen_tokens

TrueHeads = Literal["found", "published"]

CIRCUIT_METHODS = (
    *("ra", "w_norm", "michel", "atp", "knockout", "grad_sam", "ag", "grad_norm"),
    *("nap", "nap_ig", "fa", "zero", "resample", "random"),
)
"""What `circuit_test` compares by default."""


def circuit_test(
    model: nn.Module,
    circuit: str = "ioi",
    *,
    methods: str | Sequence[str] = CIRCUIT_METHODS,
    heads: TrueHeads | Heads = "found",
    n: Whole = 100,
    top: Whole = 10,
    attention: Real = 0.3,
    random_orders: Whole = 20,
    answer_in_input: bool = True,
    seed: Whole = 0,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Say how well each ranking method finds the heads of a known circuit.

    Args:
        model: A HookedTransformer or TransformerBridge.
        circuit: `"ioi"`, `"greater_than"` or `"induction"` (`ra_lens.tasks.circuit_prompts`).
        methods: Names of `ra_lens.heads.ranking_methods()`.
        heads: Which heads are true: `"found"` in this model by exact effects and attention;
            `"published"`, the list of `known_heads(circuit)`, which is of GPT-2 small; or labels
            such as `["L9H9", "L10H0"]`; negative numbers count from the end.
        n: Prompts. Where heads are to be found the first half does that, and the other half ranks.
        top: For heads to be found: how many of the largest exact effects count.
        attention: For heads to be found: the least share of a head's attention, from the last
            token, that what has to be looked at gets.
        random_orders: How many orders to draw for random methods.
        answer_in_input: Whether methods that read gradients or patterns read prompt and answer, or
            the prompt alone.
        seed: Of the prompts and random orders.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped.
        progress: False hides the progress bars.

    Returns:
        One row per method, order and draw, with `auroc`, `auroc_pessimistic`,
        `average_precision`, `to_verify`, `n_true`, `n_heads` (`ra_lens.heads.Localisation`). The
        order is `"signed"`, by the scores, and where some are below 0 `"absolute"` too, by their
        sizes. `true_heads` are the heads, by `found_by`; `top1` the share of ranking prompts that
        the model answers right, `answer_diff` its logit of the answer minus that of the wrong one;
        `forwards`, `backwards` and `seconds` what the ranking took, the time being that of all
        methods that share a run. The rest is what is needed to repeat it.

    Raises:
        BadInput: an option that cannot be used, prompts that do not fit the tokenizer, no head
            found, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be edited.
    """
    names, lens = read_methods(methods), as_lens(model)
    n, seed = whole("n", n, least=2), whole("seed", seed, least=0)
    given = None if heads == "found" else _given(lens, circuit, heads)
    found_by = cast("str", heads) if heads in ("found", "published") else "given"
    at_a_time = read_batch_size(batch_size)
    settings: dict[str, Any] = {
        "experiment": "circuit",
        **model_facts(lens),
        "circuit": circuit,
        "methods": methods_facts(names, out),
        "found_by": found_by,
        "heads": given,
        "n_prompts": n,
        "top": whole("top", top, least=1),
        "attention": real("attention", attention),
        "random_orders": whole("random_orders", random_orders, least=1),
        "answer_in_input": flag("answer_in_input", answer_in_input),
        "seed": seed,
        "prepend_bos": prepend_bos,
        "batch_size": at_a_time,
    }
    refuse_hooks(lens, out)
    encode = partial(lens.encode, prepend_bos=prepend_bos)
    prompts = circuit_prompts(circuit, n, encode, seed=seed)
    settings["prompts_hash"] = prompts_hash(prompts)
    finished = finished_results(out, settings)
    if finished is not None:
        return finished
    halves = prompts[: n // 2], prompts[n // 2 :]
    with open_journal(out, settings) as journal:
        test = _Test(lens, journal, settings, prompts if given else halves[1], progress)
        if given is None:
            given = journal.unit("found", lambda: _found(test, circuit, halves[0]))
        frame = as_frame(test.rows(names, given), settings)
        if out is not None:
            write_results(frame, out)
    return frame


def _given(lens: Lens, circuit: str, heads: TrueHeads | Heads) -> list[str]:
    """Give the labels of true heads that are known before, which the model must have."""
    known = known_heads(circuit) if heads == "published" else None
    labels: list[str] = []
    for head in list_heads(heads) if known is None else known.heads:
        try:
            [(layer, marks)] = lens.sites.choose_heads(cast("Heads", [head])).items()
        except BadInput as error:
            if known is None:
                raise
            raise BadInput(
                f"{error} The published list is of {known.model}. Give that model, labels of heads "
                "of your own, or heads='found'."
            ) from error
        labels.append(f"L{layer}H{int(marks.nonzero())}")
    refuse_true_heads(labels, sum(lens.sites.n_heads), lens.name)
    return labels


@dataclass(frozen=True, eq=False)
class _Test:
    """What ranks heads on the prompts of a circuit, and says how well."""

    lens: Lens
    journal: Journal
    settings: dict[str, Any]
    prompts: Sequence[Prompt]
    progress: bool

    def rows(self, names: Sequence[str], heads: list[Any]) -> Iterator[Row]:
        """One row for each method, order and draw."""
        about = {
            "n_rank": len(self.prompts),
            "true_heads": " ".join(map(str, heads)),
            **self.journal.unit("answers", self._answers),
        }
        with tqdm(total=len(names), desc="Circuit", disable=not self.progress) as bar:
            for group in _groups(names):
                for name, draw, scores, costs in self._ranked(group):
                    orders = {"signed": scores}
                    if float(scores.scores.nan_to_num(0.0).min()) < 0:
                        orders["absolute"] = scores.absolute()
                    for order, one in orders.items():
                        found = asdict(localisation_scores(one, heads))
                        which = {"method": name, "order": order, "draw": draw}
                        yield {**which, **found, **about, **costs}
                bar.update(len(group))

    def _answers(self) -> Row:
        """How the model answers the ranking prompts."""
        questions = read_questions(
            self.lens, self.prompts, prepend_bos=self.settings["prepend_bos"]
        )
        marks = marked(ask(self.lens, questions, batch_size=self.settings["batch_size"]))
        return {"top1": marks["top1"], "answer_diff": marks["answer_diff"]}

    def _ranked(self, group: Sequence[str]) -> Iterator[tuple[str, int, HeadScores, Row]]:
        """Rank by methods that share a run, or by the draws of one method."""
        method, n_heads = find_method(group[0]), sum(self.lens.sites.n_heads)
        for draw in range(self.settings["random_orders"] if method.random else 1):
            key = f"scores|{'|'.join(group)}|{draw}"
            ranked = self.journal.unit(key, partial(self._scores, group, draw))
            for name in group:
                passes, n = find_method(name).passes, len(self.prompts)
                scores = HeadScores(
                    method=name,
                    title=find_method(name).title,
                    scores=torch.tensor(ranked[name], dtype=torch.float64),
                    layers=tuple(self.lens.sites),
                    heads=self.lens.sites.n_heads,
                    n_examples=n,
                    model_name=self.lens.name,
                )
                costs = {
                    "forwards": None if passes is None else n * passes.forwards(n_heads),
                    "backwards": None if passes is None else n * passes.backward,
                    "seconds": ranked["seconds"],
                }
                yield name, draw, scores, costs

    def _scores(self, group: Sequence[str], draw: int) -> dict[str, Any]:
        began = perf_counter()
        ranked = rank_heads(
            self.lens.module,
            self.prompts,
            methods=group,
            draw=draw,
            progress=self.progress,
            **self.reading,
        )
        scores = {name: one.scores.tolist() for name, one in ranked.items()}
        return {**scores, "seconds": round(perf_counter() - began, 3)}

    @property
    def reading(self) -> dict[str, Any]:
        """How prompts are read."""
        options = ("seed", "answer_in_input", "prepend_bos", "batch_size")
        return {name: self.settings[name] for name in options}


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Put methods together that share a run."""
    sharing = [name for name in names if find_method(name).needs is not None]
    alone = [[name] for name in names if name not in sharing]
    return [sharing, *alone] if sharing else alone


def _found(test: _Test, circuit: str, prompts: Sequence[Prompt]) -> list[str]:
    settings = test.settings
    frame = circuit_heads(
        test.lens.module,
        circuit,
        prompts,
        top=settings["top"],
        attention=settings["attention"],
        progress=test.progress,
        **test.reading,
    )
    found: Any = frame[frame["found"]]
    if found.empty or len(found) == len(frame):
        first = frame.head(3).to_dict("records")
        told = [f"{one['label']} {one['effect']:.3g}, {one['attention']:.0%}" for one in first]
        raise BadInput(
            f"found {len(found)} of {len(frame)} heads of {test.lens.name} among the "
            f"{settings['top']} largest effects with at least {settings['attention']:.0%} of their "
            f"attention on what {circuit!r} has to look at; the first are {'; '.join(told)} "
            "(effect, attention). Give another top or attention, or heads."
        )
    return list(found["label"])


def circuit_heads(
    model: nn.Module,
    circuit: str,
    prompts: Sequence[Prompt],
    *,
    top: Whole = 10,
    attention: Real = 0.3,
    answer_in_input: bool = True,
    seed: Whole = 0,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """Find the heads that move the answer to the last token, by exact patching and attention.

    Args:
        model: A HookedTransformer or TransformerBridge.
        circuit: What the prompts are of.
        prompts: From `ra_lens.tasks.circuit_prompts`.
        top: How many of the largest exact effects count; below 0 none does.
        attention: The least share of attention on what has to be looked at.
        answer_in_input: As in `head_effects`.
        seed: As in `head_effects`.
        prepend_bos: What stands in front of each prompt.
        batch_size: Rows per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        progress: False hides the progress bar.

    Returns:
        One row per head, the largest effect first, with `layer`, `head`, `label` and `found`.
        `effect` is what the answer's logit minus the best other one loses, `attention` the share
        that what has to be looked at gets from the last token; both are means over prompts.

    Raises:
        BadInput: options or prompts that cannot be used.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be edited.
    """
    lens, top = as_lens(model), whole("top", top, least=1)
    at_a_time = read_batch_size(batch_size)
    attention = real("attention", attention)
    effects = head_effects(
        model,
        prompts,
        ablation="resample",
        answer_in_input=answer_in_input,
        seed=seed,
        prepend_bos=prepend_bos,
        batch_size=at_a_time,
        progress=progress,
    ).logit_diff_effects.mean(dim=0)
    seen = attention_to_seen(lens, circuit, prompts, prepend_bos=prepend_bos, batch_size=at_a_time)
    layers = tuple(lens.sites)
    frame = pd.DataFrame(
        [
            {
                "layer": layer,
                "head": head,
                "label": f"L{layer}H{head}",
                "effect": float(effects[layers.index(layer), head]),
                "attention": float(seen[layers.index(layer), head]),
            }
            for layer, head in every_head(layers, lens.sites.n_heads)
        ]
    )
    frame = frame.sort_values("effect", ascending=False, kind="stable", ignore_index=True)
    large = (frame.index < top) & (frame["effect"] > 0)
    return frame.assign(found=large & (frame["attention"] >= attention))


def attention_to_seen(
    lens: Lens,
    circuit: str,
    prompts: Sequence[Prompt],
    *,
    prepend_bos: PrependBos,
    batch_size: int | Literal["auto"],
) -> Float[Tensor, "layer head"]:
    """Share of each head's attention, from the last token, on what it has to look at: the mean."""
    questions = read_questions(lens, prompts, prepend_bos=prepend_bos).prompts
    encode = partial(lens.encode, prepend_bos=prepend_bos)
    spans = [seen_tokens(circuit, prompt, encode) for prompt in prompts]
    total = torch.zeros(lens.sites.shape, dtype=torch.float64)
    for part, some in batches(lens, questions, batch_size):
        batch = some.lay_out(lens)
        rows = torch.arange(len(part))
        weights = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        for row, i in enumerate(part):
            weights[row, [batch.starts[row] + place for place in spans[i]]] = 1.0

        def on_seen(
            pattern: Tensor, rows: Tensor = rows, last: Tensor = batch.last, w: Tensor = weights
        ) -> Tensor:
            of_last = pattern[rows.to(pattern.device), :, last[:, 0].to(pattern.device)]
            return torch.einsum("bhk,bk->h", of_last.cpu().double(), w)

        keep: dict[str, Callable[[Tensor], Tensor]] = {
            site.pattern_name: on_seen for site in lens.sites.values()
        }
        with watched(lens, batch):
            shown, _ = lens.look(keep, *batch.model_input, batch.last)
        for row, site in zip(total, lens.sites.values(), strict=True):
            row[: site.n_heads] += shown[site.pattern_name]
    return total / len(prompts)
