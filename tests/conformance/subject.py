"""One architecture, built, loaded, and run beside its oracle: what the checks have in common."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracle import Edit, Oracle, Seen, nll
from ra_lens import RACache, check_model, run_with_ra
from ra_lens.errors import RALensError, UnsupportedModel
from ra_lens.model import Site, load_folder
from ra_lens.patching import patch_hooks

from . import knockouts
from .build import BATCH, DECODER_POS, POS, hf_model, random_ids
from .configs import ENCODER_DECODERS, MASKED
from .knockouts import Direction
from .padded import Side, padded_error
from .pieces import PAD, Architecture
from .record import Record, relative, spell

TARGETS = (5, 11)


class Subject:
    """Models and what they read; `maps` of the checks fills in `sites`, `ra` and `seen`."""

    model: Any
    sites: dict[int, Site]
    ra: RACache
    seen: list[Seen]

    def __init__(self, architecture: Architecture, folder: Path, record: Record) -> None:
        self.architecture, self.folder, self.record = architecture, folder, record
        self.ids = random_ids(BATCH, POS)
        # What the model, a run and Hugging Face's model are given beside the ids.
        self.inputs: dict[str, Any] = {}
        self.options: dict[str, Any] = {"target": list(TARGETS)}
        decoder_ids = None
        if architecture.name in ENCODER_DECODERS:
            start = torch.full((BATCH, 1), architecture.options["decoder_start_token_id"])
            decoder_ids = torch.cat([start, random_ids(BATCH, DECODER_POS - 1, seed=2)], dim=1)
            self.inputs = {"decoder_input": decoder_ids}
            self.options |= self.inputs
        if architecture.name in MASKED:
            self.options["position"] = -1
        hf = hf_model(architecture, folder)
        self.hf_inputs = {} if decoder_ids is None else {"decoder_input_ids": decoder_ids}
        with torch.no_grad():
            self.hf_logits = hf(self.ids, use_cache=False, **self.hf_inputs).logits
        self.softcap = getattr(hf.config, "attn_logit_softcapping", None)
        self.oracle = Oracle.sound(hf, self.ids, **self.hf_inputs)

    def hf_with(self, edit: Edit | None) -> Tensor:
        """Logits of Hugging Face's model, with its patterns edited."""
        return self.oracle.logits(self.ids, edit=edit, **self.hf_inputs)

    def fail(self, what: str) -> None:
        self.record.failures.append(what)

    def boot(self, dtype: torch.dtype = torch.float32) -> Any:
        try:
            return load_folder(self.folder, kind="TransformerBridge", device="cpu", dtype=dtype)
        except RALensError as error:
            self.record.end("does not boot", spell(error))
        except Exception as error:
            self.fail(f"loading: {spell(error)}")
            self.record.end("does not boot", spell(error))

    def patch_error(self, model: Any, sites: dict[int, Any], *, zero_rows: bool) -> float | str:
        """Error of log-probabilities with random maps added, relative to what these change.

        With `zero_rows` the rows of the maps sum to 0, as those of R do: then folding value biases
        does not change what an addition means.
        """
        generator = torch.Generator().manual_seed(1)
        maps: dict[int, Tensor] = {}
        for key, one in zip(self.sites, self.seen, strict=True):
            pattern = one.pattern.float()
            causal = not bool((pattern.sum((0, 1)) > 0).triu(1).any())
            value = 0.3 * torch.randn(pattern.shape, generator=generator)
            support = torch.ones_like(value).tril() if causal else torch.ones_like(value)
            mean = (value * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
            maps[key] = (value - mean if zero_rows else value) * support
        try:
            hooks = patch_hooks(maps, sites, scale=0.5)
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                patched = model(self.ids, **self.inputs)
        except RALensError as error:
            return spell(error)
        except Exception as error:
            self.fail(f"patches: {spell(error)}")
            return "failed"
        added = [0.5 * maps[key] for key in self.sites]
        wanted = self.hf_with(lambda site, a: a + added[site]).log_softmax(-1)
        change = wanted - self.hf_with(None).log_softmax(-1)
        if float(change.norm() / wanted.norm()) < 1e-3:
            self.fail("patches: the oracle's own change is too small to tell")
        return float((patched.double().log_softmax(-1) - wanted).norm() / change.norm())

    def cut_error(self, model: Any, renormalise: bool) -> float | str:
        """Error of log-probabilities with edges cut, relative to what the cuts change."""
        cells = knockouts.real_cuts(self.ra, BATCH)
        try:
            hooks = knockouts.hooks_for(model, cells, renormalise=renormalise)
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                found = model(self.ids, **self.inputs)
        except RALensError as error:
            return spell(error)
        except Exception as error:
            self.fail(f"knockouts: {spell(error)}")
            return "failed"
        layers = list(self.sites)
        how = "knockout" if renormalise else "cut"
        rows = [Direction(i, tuple(cells[i]), how) for i in range(BATCH)]
        wanted = self.hf_with(lambda site, a: knockouts.moved(a, layers[site], rows, 1.0))
        wanted, plain = wanted.log_softmax(-1), self.hf_with(None).log_softmax(-1)
        if float((wanted - plain).norm() / plain.norm()) < 1e-3:
            self.fail("knockouts: the oracle's own change is too small to tell")
        return float((found.double().log_softmax(-1) - wanted).norm() / (wanted - plain).norm())

    def foretelling_error(self) -> float:
        """Error of what the cache foretells of cuts, against differences of the oracle's loss.

        Where it does not run in float64, against its gradient by t.
        """
        every, layers = knockouts.directions(self.ra, BATCH), list(self.sites)
        examples = [one.example for one in every]
        more = {name: value[examples] for name, value in self.hf_inputs.items()}
        called = Counter(self.oracle.sites_called(self.ids, **self.hf_inputs))

        answers = [TARGETS[i] for i in examples]

        def once(edit: Edit) -> Edit:
            times: Counter[int] = Counter()

            def the_last_time(site: int, pattern: Tensor) -> Tensor:
                times[site] += 1
                return edit(layers[site], pattern) if times[site] == called[site] else pattern

            return the_last_time

        def losses(edit: Edit) -> Tensor:
            logits = self.oracle.logits(self.ids[examples], edit=once(edit), **more)
            return -logits[:, -1].log_softmax(-1)[range(len(every)), answers]

        if self.oracle.wide:
            return knockouts.foretelling_error(every, knockouts.slopes(every, losses))
        t = torch.zeros(len(every), requires_grad=True)
        edit = once(lambda layer, a: knockouts.moved(a, layer, every, t))
        found = self.oracle.gradient(t, self.ids[examples], nll(*answers), edit, **more)
        return knockouts.foretelling_error(every, found)

    def padding(self, model: Any, side: Side, what: str, limit: float) -> float | None:
        """Error of R and loss in a padded batch, of answers of one and of two tokens."""
        options = {name: value for name, value in self.options.items() if name != "target"}
        answers = [[token] for token in TARGETS]
        if self.architecture.name not in MASKED:  # which predict one token where it stands
            answers[0].append(TARGETS[1])
        try:
            error = padded_error(model, self.ids, side, answers=answers, pad=PAD, **options)
        except Exception as error:
            self.fail(f"{what}, padded on the {side}: {spell(error)}")
            return None
        if not error <= limit:
            self.fail(f"{what}, padded on the {side}: error {error:.1e}")
        return error

    def refuses(self, what: str) -> None:
        try:
            check_model(self.model)
        except UnsupportedModel:
            return
        except Exception as error:
            self.fail(f"check_model of a model that {what}: {spell(error)}")
            return
        self.fail(f"check_model accepts a model that {what}")

    def reports(self, model: Any, what: str) -> Any:
        try:
            report = check_model(model)
        except Exception as error:
            self.fail(f"check_model of the {what} model: {spell(error)}")
            return None
        if report.problems:
            self.fail(f"check_model of the {what} model: {report.problems}")
        return report

    def error_of(self, model: Any, what: str) -> float | str | None:
        """Largest error of R of another copy of the model, against this one's."""
        try:
            _, ra = run_with_ra(model, self.ids, **self.options)
        except RALensError as error:
            return f"refused: {spell(error)}"
        except Exception as error:
            self.fail(f"{what}: {spell(error)}")
            return None
        if any(ra["ra", key].dtype != torch.float32 for key in self.sites):
            self.fail(f"{what}: maps are not float32")
        return max(relative(ra["ra", key], self.ra["ra", key]) for key in self.sites)
