"""What is checked of one architecture on one TransformerLens: a record of numbers and reasons.

- logits: TransformerLens's own against Hugging Face's.
- maps: R~ = R / scale of every site against dL/dS of the oracle; also with blocks recomputed, and
  with the hooks alone and a backward pass of one's own.
- patches: a random map added by `patch_hooks`, against the same addition to the oracle's softmax
  output; the error is relative to what the addition changed.
- knockouts: what a cache foretells of cuts, single edges and sets, against central differences of
  the oracle's loss; and edges cut by `knockout_hooks`, against the same cut at the oracle's softmax
  output, relative to what the cut changed.
- vectors: queries, keys, values and their gradients against what Hugging Face's code multiplies and
  autograd there, the paper's equations too; gradients of weights against autograd's.
- scale: against the factor measured between q·k and S.
- heads: heads masked by `mask_hooks`, against the oracle without their patterns.
- padding: R and loss of two prompts in a batch padded on either side, against each alone; and
  whether they run together or in groups of one length.
- compat: R in compatibility mode against R without it; patches and padding there.
- bfloat16, float16: R of a model of that type against R in float32.
- what `check_model` says, against all that.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oracle import Oracle, nll
from ra_lens import check_model, get_ra_caching_hooks, run_with_ra
from ra_lens.errors import RALensError
from ra_lens.model import as_lens, load_folder
from ra_lens.patching.masking import mask_hooks, need_heads

from .build import hf_model, write_folder
from .configs import NORMALISED
from .padded import SIDES, by_length
from .pieces import Architecture
from .record import (
    COMPAT_LIMIT,
    FINITE,
    FORETOLD_LIMIT,
    MAPS_LIMIT,
    PATCH_LIMIT,
    SAME_LOGITS,
    Over,
    Record,
    relative,
    spell,
)
from .scale import measured_scale
from .subject import TARGETS, Subject
from .vectors import vector_errors


def check(architecture: Architecture, *, quick: bool = False) -> Record:
    """Run every check on one architecture.

    Args:
        architecture: What to build.
        quick: Leave out what needs further copies of the model (compatibility mode, precision).
    """
    began = time.perf_counter()
    record = Record(architecture.name)
    with (
        tempfile.TemporaryDirectory(prefix="conformance_") as where,
        warnings.catch_warnings(),
        redirect_stdout(StringIO()),
    ):
        warnings.simplefilter("ignore")
        folder = write_folder(architecture, Path(where, architecture.name))
        with suppress(Over):
            _Checks(architecture, folder, record).run(quick=quick)
    record.seconds = round(time.perf_counter() - began, 1)
    return record


class _Checks(Subject):
    def run(self, *, quick: bool) -> None:
        record = self.record
        self.model = self.boot()
        self.logits()
        self.maps()
        self.scales()
        self.patches()
        self.knockouts()
        self.vectors()
        self.own_backward()
        self.heads()
        self.padded()
        with torch.no_grad():
            if not torch.equal(self.model(self.ids, **self.inputs), self.own):
                self.fail("the model was not left as it was")
        if not quick:
            self.compat()
            record.bfloat16 = self.precision(torch.bfloat16, floor=0.05)
            record.float16 = self.precision(torch.float16, floor=0.01)
            self.report()
        record.finish()

    def logits(self) -> None:
        """Go on only where TransformerLens computes what Hugging Face computes."""
        try:
            with torch.no_grad():
                self.own = self.model(self.ids, **self.inputs)
        except Exception as error:
            self.refuses("does not run")
            self.record.end("does not run", spell(error))
        self.record.logits = relative(self.own, self.hf_logits)
        if self.record.logits > SAME_LOGITS:
            report = check_model(self.model)
            if not any("logits" in problem for problem in report.problems):
                self.fail("check_model does not say that the logits differ")
            self.padded()
            self.record.by_length = by_length(report)
            self.record.end("logits differ", f"logits {self.record.logits:.0%} off Hugging Face's")

    def maps(self) -> None:
        record = self.record
        self.gradients, self.seen = self.oracle.seen(self.ids, nll(*TARGETS), **self.hf_inputs)
        try:
            # The second run knows which layers only show their pattern: it is another code path.
            read, first = run_with_ra(self.model, self.ids, **self.options)
            _, self.ra = run_with_ra(self.model, self.ids, **self.options)
        except RALensError as error:
            no_attention = "hook_pattern" in str(error) and "no hook point" in str(error)
            self.refuses("gives no maps")
            self.record.end("no attention" if no_attention else "maps refused", spell(error))
        except Exception as error:
            self.record.end("failing", f"maps: {spell(error)}")
        self.sites = dict(sorted(self.ra.sites.items()))
        record.sites = len(self.sites)
        if len(self.sites) != len(self.gradients):
            self.record.end(
                "failing", f"{len(self.sites)} sites, {len(self.gradients)} attention softmaxes"
            )
        record.scales = [round(site.scale, 6) for site in self.sites.values()]
        self.found = {key: self.ra["ra", key] / site.scale for key, site in self.sites.items()}
        wanted = dict(zip(self.sites, self.gradients, strict=True))
        record.maps = max(relative(self.found[key], wanted[key]) for key in self.sites)
        if not record.maps <= MAPS_LIMIT:
            self.fail(f"maps: error {record.maps:.1e}")
        error = relative(read[:, -1], self.hf_logits[:, -1])
        if not error <= MAPS_LIMIT:
            self.fail(f"logits of the run: error {error:.1e}")
        change = max(relative(first["ra", key], self.ra["ra", key]) for key in self.sites)
        if not change <= MAPS_LIMIT:
            self.fail(f"maps: the first run differs from the second by {change:.1e}")
        if any(site.repeated for site in self.sites.values()):
            return
        _, again = run_with_ra(self.model, self.ids, **self.options, recompute=True)
        change = max(relative(again["ra", key], self.ra["ra", key]) for key in self.sites)
        if not change <= MAPS_LIMIT:
            self.fail(f"maps: with recompute=True they differ by {change:.1e}")
        patterns = zip(self.sites, self.seen, strict=True)
        error = max(relative(self.ra["pattern", key], one.pattern) for key, one in patterns)
        if not error <= MAPS_LIMIT:
            self.fail(f"patterns: error {error:.1e}")

    def scales(self) -> None:
        ours = [site.scale for site in self.sites.values()]
        factors = [measured_scale(one, softcap=self.softcap) for one in self.seen]
        if all(f is not None and abs(f - 1) < 1e-6 for f in factors) and ours != factors:
            # q may be scaled before the product: measure from what the projections give.
            with suppress(Exception):
                products = self.oracle.projected_products(self.ids, **self.hf_inputs)
                pairs = zip(self.seen, products, strict=True)
                factors = [measured_scale(replace(one, product=p)) for one, p in pairs]
        if any(factor is None for factor in factors):
            self.record.scale = "not measured"
            return
        self.record.scale = max(abs(c / f - 1) for c, f in zip(ours, factors, strict=True))
        if not self.record.scale < 1e-5:
            self.fail(f"scale: found {ours}, measured {factors}")

    def patches(self) -> None:
        record = self.record
        record.patches = self.patch_error(self.model, self.ra.sites, zero_rows=False)
        if isinstance(record.patches, str):
            record.route = "refused"
            return
        record.route = " and ".join(sorted({_route(site) for site in self.sites.values()}))
        if not record.patches <= PATCH_LIMIT:
            self.fail(f"patches: error {record.patches:.1e}")

    def knockouts(self) -> None:
        record = self.record
        record.foretold = self.foretelling_error()
        if not record.foretold <= FORETOLD_LIMIT:
            self.fail(f"knockouts: foretold with an error of {record.foretold:.1e}")
        errors = [self.cut_error(self.model, renormalise) for renormalise in (True, False)]
        refused = [error for error in errors if isinstance(error, str)]
        if refused:
            record.knockouts = refused[0]
            return
        record.knockouts = max(errors)
        if not record.knockouts <= PATCH_LIMIT:
            self.fail(f"knockouts: error {record.knockouts:.1e}")

    def vectors(self) -> None:
        errors, self.record.no_vectors, over = vector_errors(self, TARGETS)
        self.record.vectors = max(errors.values())
        if over:
            self.fail(f"vectors: error of {', '.join(over)}")

    def own_backward(self) -> None:
        """The hooks alone, with the caller's own backward pass, parameters frozen or not."""
        for frozen in (False, True):
            for parameter in self.model.parameters():
                parameter.requires_grad_(not frozen)
            try:
                ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(self.model)
                with torch.enable_grad(), self.model.hooks(fwd_hooks, bwd_hooks):
                    nll(*TARGETS)(self.model(self.ids, **self.inputs)).backward()
                error = max(relative(ra["ra", key], self.ra["ra", key]) for key in self.sites)
            except Exception as error:
                self.fail(f"hooks with a backward pass of one's own: {spell(error)}")
                continue
            if not error <= MAPS_LIMIT:
                self.fail(f"hooks with a backward pass of one's own: error {error:.1e}")

    def heads(self) -> None:
        """Two heads masked by `mask_hooks`, against the oracle with their patterns set to 0."""
        last, head = len(self.sites) - 1, 1
        n_heads = self.seen[last].pattern.shape[1]
        keep = torch.ones(len(self.sites), n_heads, dtype=torch.bool)
        keep[0, 0] = keep[last, head] = False
        try:
            need_heads(as_lens(self.model))
            hooks = mask_hooks(self.ra.sites, keep)
            with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
                found = self.model(self.ids, **self.inputs)
        except RALensError as error:
            self.record.heads = spell(error)
            return
        except Exception as error:
            self.fail(f"heads: {spell(error)}")
            return

        def without(site: int, pattern: Tensor) -> Tensor:
            return pattern * keep[site].reshape(-1, 1, 1)

        wanted, unmasked = self.hf_with(without), self.hf_with(None)
        self.record.heads = float((found.double() - wanted).norm() / (wanted - unmasked).norm())
        if not self.record.heads <= PATCH_LIMIT:
            if self.architecture.name in NORMALISED:
                self.record.heads = "what the heads give is normalised together before z"
            else:
                self.fail(f"heads: error {self.record.heads:.1e}")

    def padded(self) -> None:
        self.record.padding_left, self.record.padding_right = (
            self.padding(self.model, side, "padding", COMPAT_LIMIT) for side in SIDES
        )

    def compat(self) -> None:
        model = self.boot()
        if not hasattr(model, "enable_compatibility_mode"):
            return
        try:
            model.enable_compatibility_mode(disable_warnings=True)
            with torch.no_grad():
                own = model(self.ids, **self.inputs).log_softmax(-1)
        except Exception as error:
            self.record.compat = f"raises {spell(error)}"
            return
        difference = relative(own, self.hf_logits.log_softmax(-1))
        if not difference < SAME_LOGITS:
            self.record.compat = f"the mode changes the logits by {difference:.1%}"
            if check_model(model).ok:
                self.fail("check_model does not say that compatibility mode changes the logits")
            return
        self.record.compat = self.error_of(model, "compatibility mode")
        if isinstance(self.record.compat, float) and not self.record.compat <= COMPAT_LIMIT:
            self.fail(f"compatibility mode: error {self.record.compat:.1e}")
        self.reports(model, "processed")
        for side in SIDES:
            self.padding(model, side, "compatibility mode", COMPAT_LIMIT)
        if isinstance(self.record.patches, str):
            return
        patches = self.patch_error(model, as_lens(model).sites, zero_rows=True)
        if isinstance(patches, str) or not patches <= COMPAT_LIMIT:
            self.fail(f"patches in compatibility mode: {patches}")
        # Renormalised, as folded value biases would change what another cut means.
        cut = self.cut_error(model, renormalise=True)
        if isinstance(cut, str) or not cut <= COMPAT_LIMIT:
            self.fail(f"knockouts in compatibility mode: {cut}")

    def precision(self, dtype: torch.dtype, floor: float) -> float | str | None:
        """R in another precision; it may be as far off as Hugging Face's own gradient is there."""
        name = str(dtype).removeprefix("torch.")
        try:
            model = load_folder(self.folder, kind="TransformerBridge", device="cpu", dtype=dtype)
            with torch.no_grad():
                model(self.ids, **self.inputs)
        except Exception as error:
            return f"the model does not run: {spell(error)}"
        found = self.error_of(model, name)
        if isinstance(found, float):
            narrow = hf_model(self.architecture, self.folder).to(dtype)
            theirs, _ = Oracle(narrow, wide=False).score_gradients(
                self.ids, nll(*TARGETS), **self.hf_inputs
            )
            own = max(map(relative, theirs, self.gradients))
            if not found <= floor + 3 * own:
                self.fail(f"{name}: error {found:.1e}, Hugging Face's own {own:.1e}")
            self.reports(model, name)
            for side in SIDES:
                self.padding(model, side, name, FINITE)
        return found

    def report(self) -> None:
        """What `check_model` says of a copy that nothing was run on, against what was measured."""
        report = self.reports(self.boot(), "float32")
        if report is None:
            return
        self.record.by_length = by_length(report)
        for row, (key, site) in zip(report.sites, self.sites.items(), strict=True):
            patches = "refused" if self.record.route == "refused" else _route(site)
            ours = (key, site.observe_only, site.scale, patches)
            if (row.layer, row.observe_only, row.scale, row.patches) != ours:
                self.fail(f"check_model says {row}, and was {ours}")


def _route(site: Any) -> str:
    return "z" if site.observe_only else "pattern"
