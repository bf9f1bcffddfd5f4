"""Variants of HookedTransformer, built from HookedTransformerConfig, against finite differences.

There is no second implementation to compare with. The oracle is the loss itself: in float64, each
single entry of the softmax input is moved a little up and down, which gives every entry of dL/dS
without any backward pass. A patch is compared with the same addition made to z with a hook written
here, through the values; edges cut, with scores of −∞ or a pattern of 0 there.
"""

from __future__ import annotations

import copy
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from oracle import Open, Seen, Wide, nll
from ra_lens import check_model, run_with_ra, vjp
from ra_lens.errors import RALensError
from ra_lens.patching import patch_hooks
from ra_lens.patching.masking import mask_hooks
from saved_models import randomise

from . import knockouts
from .knockouts import Cell
from .padded import SIDES, Side, by_length, padded_error
from .record import COMPAT_LIMIT, SAME_LOGITS, Over, Record, relative, spell
from .scale import measured_scale
from .variants import BASE, D_VOCAB, N_HEADS, VARIANTS
from .vectors import errors_of, wanted_vectors, weight_errors

POS, STEP = 6, 1e-5
TARGETS = (5, 11)
MAPS_LIMIT = 1e-6
PATCH_LIMIT = 1e-8


def check_variant(name: str) -> Record:
    """Run every check on one variant of the installed HookedTransformer."""
    began = time.perf_counter()
    record = Record(name)
    with warnings.catch_warnings(), redirect_stdout(StringIO()), suppress(Over):
        warnings.simplefilter("ignore")
        _Variant(name, record).run()
    record.seconds = round(time.perf_counter() - began, 1)
    return record


class _Variant:
    def __init__(self, name: str, record: Record) -> None:
        self.name, self.record, self.options = name, record, VARIANTS[name]
        self.inputs: dict[str, Any] = {"target": list(TARGETS)}
        self.both_ways = self.options.get("attention_dir") == "bidirectional"
        if self.both_ways:  # which token is predicted has to be said
            self.inputs["position"] = -1
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, D_VOCAB, (2, POS), generator=generator)

    def run(self) -> None:
        record = self.record
        self.model = self.build(torch.float64)
        with torch.no_grad():
            self.logits = self.model(self.ids)
        self.maps()
        self.scale()
        self.patches()
        self.knockouts()
        self.vectors()
        self.heads()
        self.padding()
        self.processing()
        record.bfloat16 = self.precision(torch.bfloat16)
        record.float16 = self.precision(torch.float16)
        self.report()
        record.finish()

    def build(self, dtype: torch.dtype) -> Any:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        try:
            cfg = HookedTransformerConfig(
                **{**BASE, **self.options}, dtype=dtype, device="cpu", seed=None
            )
            model = HookedTransformer(cfg)
        except Exception as error:
            self.record.end("does not boot", spell(error))
        torch.nn.Module.to(model, dtype)  # the gate of experts is float32 whatever the type
        randomise(model, seed=zlib.crc32(self.name.encode()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".w"):  # the gains of this class's norms
                    parameter.copy_(1 + 0.4 * parameter)
        return model.eval()

    # ---- maps -----------------------------------------------------------------------------------

    def maps(self) -> None:
        record = self.record
        try:
            for _ in range(2):
                _, self.ra = run_with_ra(self.model, self.ids, **self.inputs)
        except RALensError as error:
            record.end("maps refused", spell(error))
        except Exception as error:
            record.end("failing", f"maps: {spell(error)}")
        self.sites = dict(sorted(self.ra.sites.items()))
        record.sites, record.scales = len(self.sites), [s.scale for s in self.sites.values()]
        errors = []
        for layer, site in self.sites.items():
            for example in range(len(self.ids)):
                found = self.ra["ra", layer][example] / site.scale
                wanted = self.differences(layer, example)
                errors.append(relative(found, wanted))
        record.maps = max(errors)
        if not record.maps <= MAPS_LIMIT:
            record.failures.append(f"maps: error {record.maps:.1e}")

    def differences(self, layer: int, example: int) -> Tensor:
        """dL/dS of one example, each entry by a central difference of the loss."""
        n = N_HEADS * POS * POS
        moves = STEP * torch.eye(n, dtype=torch.float64).reshape(n, N_HEADS, POS, POS)
        ids = self.ids[example].expand(n, -1)

        def loss(moved: Tensor) -> Tensor:
            def move(scores: Tensor, hook: Any) -> Tensor:
                return scores + moved

            name = f"blocks.{layer}.attn.hook_attn_scores"
            with torch.no_grad(), Wide(), self.model.hooks(fwd_hooks=[(name, move)]):
                logits = self.model(ids)
            return -logits[:, -1].log_softmax(-1)[:, TARGETS[example]]

        return ((loss(moves) - loss(-moves)) / (2 * STEP)).reshape(N_HEADS, POS, POS)

    def clipped(self, x: Tensor) -> Tensor:
        """Queries, keys or values as they are used: clip_qkv clips them after their hooks."""
        limit = self.options.get("clip_qkv")
        return x if limit is None else x.clamp(-limit, limit)

    # ---- the rest -------------------------------------------------------------------------------

    def scale(self) -> None:
        _, cache = self.model.run_with_cache(self.ids)
        errors = []
        for layer, site in self.sites.items():
            rotated = f"blocks.{layer}.attn.hook_rot_q" in cache
            q, k = (cache[f"rot_{x}" if rotated else x, layer] for x in "qk")
            if self.options.get("use_qk_norm"):  # comes after their hooks
                attn = self.model.blocks[layer].attn
                q, k = (norm(x) for norm, x in ((attn.q_norm, q), (attn.k_norm, k)))
            q, k = self.clipped(q), self.clipped(k)
            product = torch.einsum("bqhd,bkhd->bhqk", q, _repeated(k))
            seen = Seen(layer, cache["attn_scores", layer], cache["pattern", layer], product)
            factor = measured_scale(seen, softcap=self.options.get("attn_scores_soft_cap"))
            if factor is None:
                self.record.scale = "not measured"
                return
            errors.append(abs(site.scale / factor - 1))
        self.record.scale = max(errors)
        if not self.record.scale < 1e-6:
            self.record.failures.append(f"scale: error {self.record.scale:.1e}")

    def patches(self) -> None:
        record, values = self.record, {}
        generator = torch.Generator().manual_seed(1)
        maps = {
            layer: 0.3 * torch.randn(2, N_HEADS, POS, POS, generator=generator).double()
            for layer in self.sites
        }
        if not self.both_ways:
            maps = {layer: value.tril() for layer, value in maps.items()}

        def keep(layer: int) -> Callable[..., None]:
            def at_values(v: Tensor, hook: Any) -> None:
                values[layer] = self.clipped(v)

            return at_values

        def add(layer: int) -> Callable[..., Tensor]:
            def at_z(z: Tensor, hook: Any) -> Tensor:
                added = torch.einsum("bhqk,bkhd->bqhd", maps[layer], _repeated(values[layer]))
                return z + 0.5 * added

            return at_z

        by_hand = [(f"blocks.{i}.attn.hook_v", keep(i)) for i in self.sites]
        by_hand += [(f"blocks.{i}.attn.hook_z", add(i)) for i in self.sites]
        with torch.no_grad(), self.model.hooks(fwd_hooks=by_hand):
            wanted = self.model(self.ids)
        try:
            hooks = patch_hooks(maps, self.ra.sites, scale=0.5)
            with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
                found = self.model(self.ids)
        except RALensError as error:
            record.patches, record.route = spell(error), "refused"
            return
        except Exception as error:
            record.failures.append(f"patches: {spell(error)}")
            return
        record.route = "pattern"
        record.patches = float((found - wanted).norm() / (wanted - self.logits).norm())
        if not record.patches <= PATCH_LIMIT:
            record.failures.append(f"patches: error {record.patches:.1e}")

    def knockouts(self) -> None:
        """What is foretold of cuts, by differences of the loss; cuts made, by scores of −∞."""
        record, every = self.record, knockouts.directions(self.ra)
        examples = [one.example for one in every]
        answers = [TARGETS[i] for i in examples]

        def losses(edit: Callable[[int, Tensor], Tensor]) -> Tensor:
            with Wide():
                logits = self.with_patterns(edit, self.ids[examples])
            return -logits[:, -1].log_softmax(-1)[range(len(every)), answers]

        record.foretold = knockouts.foretelling_error(every, knockouts.slopes(every, losses))
        if not record.foretold <= MAPS_LIMIT:
            record.failures.append(f"knockouts: foretold with an error of {record.foretold:.1e}")
        cells = knockouts.real_cuts(self.ra)
        errors: list[float] = []
        for renormalise in (True, False):
            wanted = self.cut_by_hand(cells, renormalise=renormalise)
            try:
                hooks = knockouts.hooks_for(self.model, cells, renormalise=renormalise)
                with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
                    found = self.model(self.ids)
            except Exception as error:
                record.failures.append(f"knockouts: {spell(error)}")
                return
            errors.append(float((found - wanted).norm() / (wanted - self.logits).norm()))
        record.knockouts = max(errors)
        if not record.knockouts <= PATCH_LIMIT:
            record.failures.append(f"knockouts: error {record.knockouts:.1e}")

    def vectors(self) -> None:
        """Against autograd at what the model's own code multiplies, and at its weights."""
        _, ra = run_with_ra(self.model, self.ids, **self.inputs, vectors=True)
        loss = nll(*TARGETS)
        attention = {i: self.model.blocks[i].attn for i in self.sites}
        weights = {
            (name, i): getattr(attn, f"_{name}", None)
            if hasattr(attn, f"_{name}")
            else getattr(attn, name)
            for i, attn in attention.items()
            for name in vjp.WEIGHTS
        }
        with torch.enable_grad(), Wide(), Open(2, {(POS, POS)}, {}, None) as opened:
            total = loss(self.model(self.ids))
        wanted = wanted_vectors(
            self.sites.values(), opened.seen, total, self.options.get("attn_scores_soft_cap")
        )
        errors = errors_of(ra, wanted, self.options.get("attn_scores_soft_cap"))

        def gradients(kept: dict[Any, Tensor]) -> dict[Any, Tensor]:
            found = torch.autograd.grad(total, list(kept.values()))
            return {
                key: g.flatten(0, 1) if key[0] == "W_O" else g.transpose(0, 1).flatten(1)
                for key, g in zip(kept, found, strict=True)
            }

        errors |= weight_errors(ra, weights, gradients)
        self.record.vectors = max(errors.values())
        over = [f"{what} {error:.1e}" for what, error in errors.items() if not error <= MAPS_LIMIT]
        if over:
            self.record.failures.append(f"vectors: error of {', '.join(over)}")

    def cut_by_hand(self, cells: dict[int, list[Cell]], *, renormalise: bool) -> Tensor:
        """Logits with scores of −∞ at some edges, or with their patterns at 0."""
        place = "attn_scores" if renormalise else "pattern"

        def cut(layer: int) -> Callable[..., Tensor]:
            def at_map(value: Tensor, hook: Any) -> Tensor:
                for example, of_example in cells.items():
                    for cell in of_example:
                        if cell[0] == layer:
                            value[(example, *cell[1:])] = -torch.inf if renormalise else 0.0
                return value

            return at_map

        hooks = [(f"blocks.{i}.attn.hook_{place}", cut(i)) for i in self.sites]
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            return self.model(self.ids)

    def with_patterns(self, edit: Callable[[int, Tensor], Tensor], ids: Tensor) -> Tensor:
        """Logits with the patterns edited, by layer."""

        def at(layer: int) -> Callable[..., Tensor]:
            return lambda pattern, hook: edit(layer, pattern)

        hooks = [(f"blocks.{i}.attn.hook_pattern", at(i)) for i in self.sites]
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            return self.model(ids)

    def heads(self) -> None:
        """Two heads masked by `mask_hooks`, against their patterns set to 0."""
        keep = torch.ones(len(self.sites), N_HEADS, dtype=torch.bool)
        keep[0, 0] = keep[-1, 1] = False

        def without(layer: int) -> Callable[..., Tensor]:
            def at_pattern(pattern: Tensor, hook: Any) -> Tensor:
                return pattern * keep[layer].reshape(-1, 1, 1)

            return at_pattern

        by_hand = [(f"blocks.{i}.attn.hook_pattern", without(i)) for i in self.sites]
        with torch.no_grad(), self.model.hooks(fwd_hooks=by_hand):
            wanted = self.model(self.ids)
        with torch.no_grad(), self.model.hooks(fwd_hooks=mask_hooks(self.ra.sites, keep)):
            found = self.model(self.ids)
        self.record.heads = float((found - wanted).norm() / (wanted - self.logits).norm())
        if not self.record.heads <= PATCH_LIMIT:
            self.record.failures.append(f"heads: error {self.record.heads:.1e}")

    def padding(self) -> None:
        """R and loss of two prompts in a padded batch, of answers of one and of two tokens."""
        more = {"position": -1} if self.both_ways else {}
        answers = [[5], [11]] if self.both_ways else [[5, 11], [11]]
        errors: dict[Side, float] = {}
        for side in SIDES:
            try:
                errors[side] = padded_error(
                    self.model, self.ids, side, answers=answers, pad=0, **more
                )
            except Exception as error:
                self.record.failures.append(f"padding on the {side}: {spell(error)}")
                continue
            if not errors[side] <= MAPS_LIMIT:
                self.record.failures.append(f"padding on the {side}: error {errors[side]:.1e}")
        self.record.padding_left = errors.get("left")
        self.record.padding_right = errors.get("right")

    def processing(self) -> None:
        """R does not change with TransformerLens's processing of the weights."""
        try:
            model = copy.deepcopy(self.model)
            model.process_weights_()
            with torch.no_grad():
                own = model(self.ids)
        except Exception as error:
            self.record.compat = f"raises {spell(error)}"
            return
        difference = relative(own.log_softmax(-1), self.logits.log_softmax(-1))
        if not difference < SAME_LOGITS:
            self.record.compat = f"the processing changes the logits by {difference:.1%}"
            return
        _, ra = run_with_ra(model, self.ids, **self.inputs)
        self.record.compat = max(relative(ra["ra", i], self.ra["ra", i]) for i in self.sites)
        if not self.record.compat <= COMPAT_LIMIT:
            self.record.failures.append(f"processed weights: error {self.record.compat:.1e}")

    def report(self) -> None:
        """What `check_model` says of a model that nothing was run on."""
        try:
            report = check_model(self.build(torch.float64))
        except Exception as error:
            self.record.failures.append(f"check_model: {spell(error)}")
            return
        self.record.by_length = by_length(report)
        if report.problems:
            self.record.failures.append(f"check_model: {report.problems}")
        for row, (layer, site) in zip(report.sites, self.sites.items(), strict=True):
            if (row.layer, row.scale, row.patches) != (layer, site.scale, "pattern"):
                self.record.failures.append(f"check_model says {row}")

    def precision(self, dtype: torch.dtype) -> float | str | None:
        name = str(dtype).removeprefix("torch.")
        model = self.build(dtype)
        try:
            with torch.no_grad():
                model(self.ids)
        except Exception as error:
            return f"the model does not run: {spell(error)}"
        try:
            _, ra = run_with_ra(model, self.ids, **self.inputs)
        except RALensError as error:
            return f"refused: {spell(error)}"
        except Exception as error:
            self.record.failures.append(f"{name}: {spell(error)}")
            return None
        if any(ra["ra", layer].dtype != torch.float32 for layer in self.sites):
            self.record.failures.append(f"{name}: maps are not float32")
        error = max(relative(ra["ra", i], self.ra["ra", i]) for i in self.sites)
        if not error < 1:
            self.record.failures.append(f"{name}: error {error:.1e}")
        return error


def _repeated(x: Tensor) -> Tensor:
    """Keys or values with one head for each query head."""
    return x.repeat_interleave(N_HEADS // x.shape[2], dim=2)
