"""What experiments patch with: questions of one length, and the mean maps of some of them.

Maps are averaged entry by entry, so that questions of one length are needed: pairs whose answer is
one token (or another number of tokens, the same for all), grouped by the number of tokens of prompt
and answer (`ra_lens.tasks.same_length_sets`). Maps are taken on prompt and answer, with the mean
cross-entropy over the answer as the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

from torch import Tensor
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.experiments.runner import Cell, Protocol, Row, prompts_hash
from ra_lens.fitting import rows_of_run
from ra_lens.memory import offering
from ra_lens.model import Lens, PrependBos
from ra_lens.model.sites import MapKind
from ra_lens.numbers import Reals
from ra_lens.patching.controls import Control, control_maps
from ra_lens.patching.hooks import PatchOptions
from ra_lens.patching.mean import MeanMaps, RunningMean
from ra_lens.questions import FwdHooks, read_questions
from ra_lens.run import run_with_ra
from ra_lens.scales import SCALES, BestScale, best_scale
from ra_lens.targets import Objective, sequence_nll
from ra_lens.tasks import Prompt, Task, same_length_sets

MapName = Literal["ra", "pattern", Control]

_AT_LEAST, _AT_LEAST_BUILT_IN = 100, 40
_OF_PROMPTS: tuple[MapKind, ...] = ("ra", "pattern", "pattern_grad", "cut")


@dataclass(frozen=True, eq=False)
class LearnedMaps:
    """The maps of some questions of one length, averaged the first time that they are asked for."""

    lens: Lens
    protocol: Protocol
    prompts: Sequence[Prompt]

    @cached_property
    def mean(self) -> MeanMaps:
        """The mean maps: RA, the pattern and its gradient. One forward and one backward pass."""
        return self._ran(self.prompts, store="mean").mean()

    def maps(self, kind: MapName) -> dict[int, Tensor]:
        """Give the mean maps of a kind, or of a control, by layer."""
        if kind in get_args(Control):
            mean = self._mean_with_products if kind == "a_grad" else self.mean
            return control_maps(mean, cast("Control", kind), seed=self.protocol.seed)
        return {layer: self.mean[kind, layer] for layer in self.mean.sites}

    def best_scale(
        self,
        maps: Mapping[int, Tensor],
        *,
        scales: Reals = SCALES,
        **options: Unpack[PatchOptions],
    ) -> BestScale:
        """Find the scale at which the loss of these questions is smallest, under these maps."""
        sites = self.mean.sites
        as_ra = {sites[layer].map_name("ra"): value for layer, value in maps.items()}
        more = cast("dict[str, Any]", options)
        return best_scale(
            self.lens.module,
            MeanMaps(sites, self.mean.count, as_ra),
            [prompt.text for prompt in self.prompts],
            self._loss(self.prompts),
            scales=scales,
            **more,
            batch_size=self.protocol.batch_size,
            prepend_bos=self.protocol.prepend_bos,
            progress=False,
        )

    @cached_property
    def _mean_with_products(self) -> MeanMaps:
        """The mean maps with that of A ⊙ G, for which each prompt's own maps are needed."""
        running: RunningMean | None = None
        size = self.protocol.batch_size
        if size == "auto":
            read = read_questions(self.lens, self.prompts, prepend_bos=self.protocol.prepend_bos)
            n_read = max(map(len, read.answers))
            every = read.prompts.extended(read.answers)
            size = rows_of_run(self.lens, every, n_read=n_read, wanted=lambda _name: True)
        for start in range(0, len(self.prompts), size):
            ra = self._ran(self.prompts[start : start + size], store="maps")
            running = running or RunningMean(ra.sites)
            for site in ra.sites.values():
                for name in map(site.map_name, _OF_PROMPTS):
                    running.add(name, ra[name])
            running.count += ra.batch_size
        if running is None:
            raise BadInput("found no questions to average the maps of. Give at least one.")
        return running.result()

    def _ran(self, prompts: Sequence[Prompt], *, store: Literal["mean", "maps"]) -> RACache:
        with offering("batch_size", one_batch=store == "maps"):
            _, ra = run_with_ra(
                self.lens.module,
                [prompt.text for prompt in prompts],
                target=self._loss(prompts),
                store=store,
                prepend_bos=self.protocol.prepend_bos,
                batch_size=self.protocol.batch_size,
                progress=False,
            )
        return ra

    @staticmethod
    def _loss(prompts: Sequence[Prompt]) -> Objective:
        return sequence_nll([prompt.answer for prompt in prompts])


def asked(cell: Cell, hooks: FwdHooks, **about: Any) -> Row | list[Row]:
    """Ask all questions of a cell under hooks: a row of their mean, or a list of one for each."""
    about |= {
        "n_tokens": cell.questions.prompts.lengths[0],
        "n_test": len(cell.asked),
        "prompts_hash": prompts_hash(cell.learned["train"], cell.asked),
    }
    answers = cell.marked(cell.questions, lambda _part: hooks)
    rows = [{**row, **about} for row in cell.scored(answers)]
    return rows if cell.run.settings.get("each_question") else rows[0]


def need_one_length(cell: Cell) -> None:
    """Refuse a cell whose questions have several lengths."""
    lengths = cell.questions.prompts.lengths
    if len(set(lengths)) > 1:
        raise BadInput(
            f"the questions of {cell.task.name} with {cell.shots} demonstrations have "
            f"{min(lengths)} to {max(lengths)} tokens, though they have one length without: "
            "this tokenizer joins tokens across demonstrations. Patch without demonstrations "
            "(shots=0), or another task."
        )


def one_length(
    lens: Lens,
    task: Task,
    *,
    length: int | None,
    at_least: int | None,
    answer_tokens: int,
    prepend_bos: PrependBos,
) -> Task:
    """Give the pairs of a task that have one length, the most frequent or the one given."""
    if at_least is None:
        at_least = _AT_LEAST_BUILT_IN if task.source == "builtin" else _AT_LEAST
    every = same_length_sets(
        task,
        lambda text: lens.encode(text, prepend_bos=prepend_bos),
        answer_tokens=answer_tokens,
        at_least=1,
    )
    sizes = {n: len(one.pairs) for n, one in every.items()}
    fitting = {n: size for n, size in sizes.items() if size >= at_least}
    chosen = length if length is not None else max(fitting, key=lambda n: fitting[n], default=0)
    if chosen not in fitting:
        found = ", ".join(f"{n} tokens: {sizes[n]}" for n in sorted(sizes)) or "none"
        wanted = "" if length is None else f" of {length} tokens"
        of = "a one-token answer" if answer_tokens == 1 else f"an answer of {answer_tokens} tokens"
        raise BadInput(
            f"task {task.name!r} has no {at_least} pairs{wanted} with {of} and one length (pairs "
            f"by length of prompt and answer: {found}). Give at_least=, length= or answer_tokens=, "
            "or another task."
        )
    return every[chosen]
