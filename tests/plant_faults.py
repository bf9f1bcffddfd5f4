"""Plant faults in the source, one at a time, and tell which of them the tests find.

    python tests/plant_faults.py                          # all of them, against the default run
    python tests/plant_faults.py --only journal           # those with this in their name or kind
    python tests/plant_faults.py --tier nearest-ci        # all, against the tests nearest to each
    python tests/plant_faults.py --tier ci --out f.jsonl  # and against the CI tier what is left

A fault is a mistake that somebody could make while moving code, written as one text in the place
of another. The text must stand exactly once in the source, in whatever file: code may move, and a
fault whose text was rewritten says so and is to be written anew.

Each fault goes into a copy of the working tree, where the test files that speak most of the
changed code run, up to the first failure (`nearest`), and then those of their tests that only CI
runs (`nearest-ci`). What they do not find is planted together, for one whole default run; the tests
that fail in it then run against each of these faults alone. So it goes with what only CI runs. A
test that fails without any fault has found none.
Each result is a line of the file of `--out`, where a later call goes on. Delete it after a change.

Cost: about half a minute for each fault, and a default run.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("src", "ra_lens")
DEFAULT_RUN: tuple[str, ...] = ()
ONLY_CI = ("-mevery_model", "--every-model")
CI_RUNS = (ONLY_CI, ("--check-shapes",))
"""What CI runs beside the default run, as arguments of pytest."""
ALONE = ("-x", "-n", "0", "-p", "no:randomly")
"""In one process, in the order given, up to the first failure."""
NEAREST: dict[str, tuple[str, ...]] = {"nearest": (), "nearest-ci": ONLY_CI}
TIERS = (*NEAREST, "default", "ci")
IN_SHORT = {"nearest": "default run", "default": "default run", "nearest-ci": "ci"}
N_NEAREST = 6
MINUTES = 40
"""After these a run counts as one that a fault keeps from ending."""
NO_END = f"no end after {MINUTES} minutes"


@dataclass(frozen=True)
class Fault:
    """One mistake: `new` in the place of `old`, which stands once in the source.

    `near` is a test file that finds it, where names would not lead there.
    """

    name: str
    kind: str
    old: str
    new: str
    near: str = ""


FAULTS = (
    # ---- the formula and its scale --------------------------------------------------------------
    Fault(
        "no sum over the row",
        "formula",
        "torch.ops.aten._softmax_backward_data(pattern_grad, pattern, -1, pattern.dtype)",
        "pattern * pattern_grad",
    ),
    Fault("no softmax scale", "formula", "return self.scale\n", "return 1.0\n"),
    Fault(
        "R instead of R~ handed on to the scores",
        "formula",
        '"pattern_grad": grad})\n        return step',
        '"pattern_grad": grad})\n        return ra',
    ),
    Fault(
        "divisor taken as factor (GPT-J)",
        "scales",
        '("scale_attn", lambda divisor: 1.0 / float(divisor))',
        '("scale_attn", float)',
        "tests/run/test_exactness.py",
    ),
    Fault(
        "a batch that fits forgets the maps of the others",
        "memory",
        "room = free - plan.maps_on(device) - ",
        "room = free - ",
        "tests/run/test_memory.py",
    ),
    Fault(
        "a batch that fits leaves no room for what is not counted",
        "memory",
        "int(room * (SAFE_RECOMPUTED if plan.recompute else SAFE))",
        "int(room)",
        "tests/run/test_memory.py",
    ),
    Fault(
        "rows of a ranking that fit forget the maps kept of them",
        "memory",
        "plan.maps_on(device) + logits + ",
        "logits + ",
        "tests/run/test_rows_at_a_time.py",
    ),
    Fault(
        "rows of a forward pass that fit leave no room for what is not counted",
        "memory",
        "round(counted / SAFE_RECOMPUTED)",
        "counted",
        "tests/run/test_rows_at_a_time.py",
    ),
    Fault(
        "advice names options that the function called does not have",
        "memory",
        "if fits(other) and _has(offer, options)",
        "if fits(other)",
        "tests/run/test_rows_at_a_time.py",
    ),
    Fault(
        "maps kept elsewhere count where they are made",
        "devices",
        "site for i, site in self.sites.items() if (kept or lens.layer_devices[i]) == device",
        "site for i, site in self.sites.items() if lens.layer_devices[i] == device",
        "tests/run/test_memory_devices.py",
    ),
    Fault(
        "the mask of padding stays on the first device",
        "devices",
        "with kept, masks_beside(self._handed_on):",
        "with kept:",
        "tests/model/test_several_devices.py",
    ),
    Fault(
        "whole maps move to where a mean is kept",
        "devices",
        "self._sums.add(name, value[(..., *tokens)], self.device)",
        "self._sums.add(name, value[(..., *tokens)].to(device=self.device))",
        "tests/model/test_several_devices.py",
    ),
    Fault(
        "a report of maps on a GPU",
        "devices",
        "(flow.cpu().numpy() for flow in flows)",
        "(flow.numpy() for flow in flows)",
        "tests/model/test_several_devices_uses.py",
    ),
    Fault(
        "a loss of NaN logits is not looked at",
        "checks",
        "            if nan:\n",
        "            if nan and not infinite:\n",
        "tests/run/test_host_waits.py",
    ),
    Fault(
        "each layer's gradient is read alone",
        "checks",
        "found: list[float] = torch.stack([value.detach().to(first) for value in values]).tolist()",
        "found = [float(value.detach().to(first)) for value in values]",
        "tests/run/test_host_waits.py",
    ),
    Fault(
        "the quarter of GIM at queries only",
        "other backward",
        "_scale(node, _OF_SCORES)",
        "_scale(node, _OF_SCORES, only=-2)",
        "tests/run/test_backward.py",
    ),
    Fault(
        "a recomputed block hands back the loss's own gradient",
        "other backward",
        "        ctx.rewire(some)\n",
        "",
        "tests/run/test_backward.py",
    ),
    Fault(
        "methods of all backward passes read the exact one",
        "other backward",
        "            backward=backward,\n        )\n        runs:",
        "        )\n        runs:",
        "tests/heads/test_heads_relevance.py",
    ),
    Fault(
        "rollout takes the layers in the other order",
        "tokens",
        "mixed @ seen.to(mixed.device)",
        "seen.to(mixed.device) @ mixed",
        "tests/vocabulary/test_token_scores.py",
    ),
    Fault("best scale is the worst", "scales", "return min(tried)[-1]", "return max(tried)[-1]"),
    Fault(
        "probability of an answer is that of a mean token",
        "scales",
        "(-losses * lengths.unsqueeze(1)).exp()",
        "(-losses).exp()",
    ),
    Fault(
        "scales of a batch go to other rows",
        "scales",
        "addition * self._each.to(addition)[:, None, None, None]",
        "addition * self._each.flip(0).to(addition)[:, None, None, None]",
    ),
    Fault(
        "norms are sums of absolute values",
        "scales",
        "value.flatten(start_dim=-2).norm(dim=-1)",
        "value.flatten(start_dim=-2).norm(p=1, dim=-1)",
    ),
    Fault(
        "ranking sums over examples",
        "scales",
        "found if each is None else each.mean(dim=0)",
        "found if each is None else each.sum(dim=0)",
    ),
    Fault(
        "a batch runs once for each method",
        "scales",
        "    together = _scores_of_one_run(context, chosen)\n",
        "    together = {\n"
        "        k: v for one in chosen for k, v in _scores_of_one_run(context, [one]).items()\n"
        "    }\n",
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "an experiment runs once for each method",
        "scales",
        "self._together[chosen.split] = self._ranked(sharing)",
        "self._together[chosen.split] = self._ranked([m for m in sharing if m == method])",
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "AtP points the other way",
        "heads",
        "return -_slope_of_gate(ra)",
        "return _slope_of_gate(ra)",
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "Michel's sizes of tokens do not cancel",
        "heads",
        '(ra["z", i] * ra["z_grad", i]).sum(dim=(1, 3))',
        '(ra["z", i] * ra["z_grad", i]).sum(dim=3).abs().sum(dim=1)',
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "norm of G counts keys that no query can look at",
        "heads",
        'ra["pattern_grad", layer].where(ra["pattern", layer] > 0, 0.0).square()',
        'ra["pattern_grad", layer].square()',
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "NAP goes away from the corrupted prompt",
        "heads",
        "((other.z[layer].to(z) - z) * other.z_grad",
        "((z - other.z[layer].to(z)) * other.z_grad",
        "tests/heads/test_heads_corrupted.py",
    ),
    Fault(
        "the way to the prompt begins at the corrupted one itself",
        "heads",
        "for k in range(1, n):\n                move",
        "for k in range(n - 1):\n                move",
        "tests/heads/test_heads_corrupted.py",
    ),
    Fault(
        "resampled heads get what they gave a token earlier, after shared demonstrations",
        "heads",
        "for q in questions.tolist()]) + start\n",
        "for q in questions.tolist()]) + max(start - 1, 0)\n",
        "tests/heads/test_heads_ablation.py",
    ),
    Fault(
        "the mean of a head counts padding",
        "heads",
        "n_tokens = sum(read.lengths)",
        "n_tokens = len(read) * read.padded_width",
        "tests/heads/test_heads_ablation.py",
    ),
    Fault(
        "sizes of effects are those of the mean effect",
        "heads",
        "self.weights @ np.abs(values)}",
        "np.abs(self.weights @ values)}",
        "tests/heads/test_heads_agreement.py",
    ),
    Fault(
        "scores of one half are held to the effects of the same half",
        "heads",
        "np.concatenate([other, one])",
        "np.concatenate([one, other])",
        "tests/heads/test_heads_agreement.py",
    ),
    Fault(
        "an interval is where the draws lie, not around its value",
        "heads",
        "value + stretch * (first - middle), value + stretch * (last - middle)",
        "value + stretch * first, value + stretch * last",
        "tests/heads/test_heads_intervals.py",
    ),
    Fault(
        "draws of questions are those of the cell before, gone on with",
        "heads",
        "np.random.default_rng([seed, curves.key])",
        "np.random.default_rng([seed, len(cells)])",
        "tests/experiments/test_head_only.py",
    ),
    Fault(
        "knockouts summed with their signs",
        "heads",
        'ra["knockout", layer].abs()',
        'ra["knockout", layer]',
        "tests/heads/test_heads_gradients.py",
    ),
    Fault(
        "a mean counts batches", "scales", "self._running.count += ", "self._running.count += 1 or "
    ),
    Fault("groups taken as heads", "heads", "return heads // groups", "return groups"),
    Fault(
        "grouped heads in another order",
        "heads",
        '-> batch key (kv_head share) d_head"',
        '-> batch key (share kv_head) d_head"',
    ),
    Fault(
        "table by head, then layer",
        "heads",
        '{kind}_norm": self.norms(kind)',
        '{kind}_norm": self.norms(kind).mT.reshape_as(self.norms(kind))',
    ),
    Fault(
        "negative layers count from the last one collected",
        "heads",
        "return layer + self.n_layers if layer < 0",
        "return layer + len(self) if layer < 0",
    ),
    Fault(
        "keys of cross-attention are the decoder's",
        "heads",
        'return "input" if self.cross else self.query_side',
        "return self.query_side",
    ),
    # ---- signs ----------------------------------------------------------------------------------
    Fault(
        "logit difference upside down",
        "signs",
        "(_pick(last, wrong) - _pick(last, right))",
        "(_pick(last, right) - _pick(last, wrong))",
    ),
    Fault(
        "CM1 with the sign of the paper's code",
        "signs",
        "before.probability[:, None, None] - after.probability",
        "after.probability - before.probability[:, None, None]",
    ),
    Fault(
        "CM2 with the sign of CM1",
        "signs",
        "after.probability - before.probability[:, None, None]",
        "before.probability[:, None, None] - after.probability",
    ),
    Fault(
        "figures show R as −R",
        "signs",
        'return -maps.ra if sign == "descent"',
        'return maps.ra if sign == "descent"',
    ),
    Fault(
        "the page shows R as −R",
        "signs",
        "minus ? -gradient : gradient",
        "gradient",
        "tests/report/test_report_browser.py",
    ),
    Fault(
        "what blocking does has R's sign in the page",
        "signs",
        "? -gradient / (scale * (1 - share))",
        "? gradient / (scale * (1 - share))",
        "tests/report/test_knockouts_browser.py",
    ),
    Fault(
        "the page divides what blocking does by 1 − A where A has no digits left",
        "formula",
        "share <= 0.5 ? -gradient",
        "share <= 1 ? -gradient",
        "tests/report/test_knockouts_browser.py",
    ),
    Fault(
        "descent said to lower what it raises",
        "signs",
        'return "more" if self.ra < 0 else',
        'return "more" if self.ra > 0 else',
    ),
    Fault(
        "paths follow less for more",
        "signs",
        "return np.maximum(-maps, 0.0)",
        "return np.maximum(maps, 0.0)",
    ),
    Fault(
        "paths follow edges that the loss would not miss",
        "signs",
        'if follow in ("less", "knockout"):\n        return np.maximum(maps, 0.0)',
        'if follow in ("less", "knockout"):\n'
        '        return np.maximum(maps if follow == "less" else -maps, 0.0)',
        "tests/paths/test_paths_knockout.py",
    ),
    # ---- masks ----------------------------------------------------------------------------------
    Fault(
        "weights are shared before sinks are left out",
        "masks",
        "raw = [_without(sinks, _strength(layer, follow)) for layer in layers]\n"
        "    sums = [strength.sum(axis=(0, 2)) for strength in raw]",
        "raw = [_strength(layer, follow) for layer in layers]\n"
        "    sums = [strength.sum(axis=(0, 2)) for strength in raw]\n"
        "    raw = [_without(sinks, strength) for strength in raw]",
        "tests/paths/test_paths_sinks.py",
    ),
    Fault(
        "a map above the diagonal is added",
        "masks",
        "maps.tril() if site.causal and not site.cross else maps",
        "maps",
        "tests/patching/test_patching.py",
    ),
    Fault(
        "placed maps lose their diagonal",
        "masks",
        "keep & (columns <= rows)",
        "keep & (columns < rows)",
    ),
    Fault(
        "masking as a product keeps NaN",
        "masks",
        "torch.where(factors, own, new)",
        "(own * factors + new * ~factors)",
    ),
    Fault(
        "one head more is unmasked",
        "masks",
        "place < heads[part, None, None]",
        "place <= heads[part, None, None]",
    ),
    Fault(
        "negative attention is not cut off",
        "masks",
        "(wide + addition.to(wide.dtype)).clamp(min=0)",
        "(wide + addition.to(wide.dtype))",
    ),
    Fault(
        "no gate in the addition through z",
        "masks",
        "return z * rearrange(gate",
        "return z + 0 * rearrange(gate",
    ),
    # ---- padding and positions ------------------------------------------------------------------
    Fault(
        "columns of padding stay",
        "padding",
        "value.where(rows & columns, 0.0)",
        "value.where(rows, 0.0)",
    ),
    Fault(
        "BOS taken for padding where both are one token",
        "padding",
        "(leading - 1).clamp(min=0)",
        "leading.clamp(min=0)",
        "tests/run/test_batching.py",
    ),
    Fault(
        "padding on the left not counted", "padding", "[start + p for p in row]", "[p for p in row]"
    ),
    Fault(
        "gradient of rows without a key",
        "padding",
        "grad.masked_fill(dead, 0.0)",
        "grad",
        "tests/model/test_weight_processing.py",
    ),
    Fault(
        "maps aligned to the wrong end",
        "padding",
        "index + (n_map - lengths).unsqueeze(1)",
        "index + (lengths - n_map).unsqueeze(1)",
    ),
    Fault(
        "answers read one position late",
        "positions",
        "list(range(n - 1, n - 1 + len(row)))",
        "list(range(n, n + len(row)))",
    ),
    Fault(
        "shorter answers laid to the left",
        "positions",
        "[[0] * (width - len(row)) + row for row in self.targets]",
        "[row + [0] * (width - len(row)) for row in self.targets]",
    ),
    Fault(
        "loss not divided by the answer's length",
        "positions",
        "nll.where(theirs, 0.0).sum(dim=1) / counts",
        "nll.where(theirs, 0.0).sum(dim=1)",
    ),
    Fault(
        "a position read twice counts twice",
        "positions",
        "found / times.to(found).unsqueeze(-1)",
        "found",
    ),
    Fault(
        "answers come back in the order of lengths",
        "positions",
        ".argsort()  # as they were given",
        "  # as they were given",
    ),
    # ---- hooks and the state of the model -------------------------------------------------------
    Fault(
        "the pattern taken after other hooks",
        "hook order",
        "partial(self._at_pattern, layer), prepend=True",
        "partial(self._at_pattern, layer), prepend=False",
    ),
    Fault(
        "no copy before hooks that edit in place", "hook order", "copy=edited_next", "copy=False"
    ),
    Fault(
        "a hook stays on the model",
        "state",
        "stack.callback(point.register_forward_hook(self._tap_input).remove)",
        "point.register_forward_hook(self._tap_input)",
    ),
    Fault("parameters stay frozen", "state", "_switch(live, on=True)", "_switch(live, on=False)"),
    Fault(
        "flag of TransformerLens reset",
        "state",
        "self._model.is_caching = was_caching",
        "self._model.is_caching = False",
        "tests/run/test_leaves_nothing.py",
    ),
    Fault(
        "a faster norm with an epsilon of its own",
        "scales",
        'eps = getattr(module.config, "eps", 1e-5)',
        "eps = 1e-5",
        "tests/model/test_recompute.py",
    ),
    Fault(
        "a norm of HookedTransformer with an epsilon of its own",
        "scales",
        "x.shape[-1:], weight, bias, module.eps)",
        "x.shape[-1:], weight, bias, 1e-5)",
        "tests/model/test_recompute.py",
    ),
    Fault(
        "only the first block runs again",
        "blocks",
        "for block in blocks[:-1]",
        "for block in blocks[:1]",
    ),
    Fault(
        "one block too many is skipped",
        "blocks",
        ".children())[: int(index)]",
        ".children())[: int(index) + 1]",
    ),
    Fault(
        "memory of the graph forgotten",
        "memory",
        "return max(self.maps_on(device), self.graph_on(device))",
        "return self.maps_on(device)",
    ),
    Fault(
        "check_model lets a wrong map pass",
        "check",
        "<= 0.2 * abs(predicted) + noise",
        "<= 5.0 * abs(predicted) + noise",
    ),
    # ---- experiments ----------------------------------------------------------------------------
    Fault(
        "area by rectangles",
        "experiments",
        "(values[1:] + values[:-1]) / 2 * np.diff(shares)",
        "values[1:] * np.diff(shares)",
    ),
    Fault(
        "reversed order is the order",
        "experiments",
        'order[::-1] if direction == "reversed" else order',
        "order",
    ),
    Fault(
        "ties in no order",
        "experiments",
        ".argsort(descending=True, stable=True)",
        ".topk(len(self)).indices",
    ),
    Fault(
        "tied answers are right",
        "experiments",
        "(k - self.above).double() / (1 + self.tied)",
        "(k - self.above).double()",
    ),
    Fault("another seed of the split", "experiments", "= 42) -> Split:", "= 0) -> Split:"),
    Fault(
        "held out in one order of the words only",
        "experiments",
        "words = sorted(query.input.split(SEPARATOR))",
        "words = query.input.split(SEPARATOR)",
    ),
    Fault(
        "demonstrations hold the answer",
        "experiments",
        "[pair for pair in pairs if pair.input != query.input]",
        "list(pairs)",
    ),
    Fault(
        "best rest of a path is its next step",
        "paths",
        "rest[p] = np.max(log[p, :p] + rest[:p])",
        "rest[p] = np.max(log[p, :p])",
    ),
    Fault(
        "the beam keeps the first, not the best",
        "paths",
        "active = _best(going, top_beam, power)",
        "active = going[:top_beam]",
    ),
    Fault(
        "masked heads get what they gave on another question's twin",
        "experiments",
        "{layer: z[list(questions), columns] for layer, z",
        "{layer: z[list(questions)[::-1], columns] for layer, z",
        near="tests/experiments/test_others.py",
    ),
    Fault(
        "CMD lets too much and too little cancel",
        "experiments",
        "for of_f in (f, np.abs(1 - f))",
        "for of_f in (f, 1 - f)",
        near="tests/experiments/test_head_only.py",
    ),
    Fault(
        "heads of a circuit are found on the prompts that rank",
        "experiments",
        "_found(test, circuit, halves[0])",
        "_found(test, circuit, halves[1])",
        near="tests/experiments/test_circuit_test.py",
    ),
    Fault(
        "ties count in full for the true head",
        "experiments",
        "auroc=float(above + tied / 2)",
        "auroc=float(above + tied)",
        near="tests/heads/test_known_heads.py",
    ),
    Fault(
        "the twin names the indirect object twice, so that its answer stays",
        "experiments",
        "asked(subject, answer, answer_first=not answer_first)",
        "asked(answer, subject, answer_first=not answer_first)",
        near="tests/tasks/test_circuits.py",
    ),
    Fault(
        "what a patch does to other text is told the other way round",
        "experiments",
        "(p.exp() * (p - q)).sum()",
        "(q.exp() * (q - p)).sum()",
        "tests/experiments/test_ablations.py",
    ),
    Fault(
        "the last of the first heads is among the others too",
        "experiments",
        "heads[:k] if first else heads[k:]",
        "heads[:k] if first else heads[k - 1 :]",
        "tests/experiments/test_ablations.py",
    ),
    Fault(
        "maps of other prompts lie on the beginning of the questions",
        "experiments",
        'map_indices(n_tokens, n, n, align="right")',
        'map_indices(n_tokens, n, n, align="left")',
        "tests/experiments/test_ablations.py",
    ),
    Fault(
        "the gradient is centred over keys that a row cannot reach",
        "experiments",
        "keys = reached.sum(dim=-1, keepdim=True).clamp(min=1)",
        "keys = grad.shape[-1]",
        "tests/patching/test_controls.py",
    ),
    # ---- journals and files ---------------------------------------------------------------------
    Fault(
        "journal gone after a failure",
        "journals",
        "if finished or ",
        "if True or ",
    ),
    Fault(
        "journal of other settings taken",
        "journals",
        "if name not in _NOT_SETTINGS",
        "if name in _NOT_SETTINGS",
    ),
    Fault(
        "half a line stays in the journal",
        "journals",
        'end = data.rfind(b"\\n") + 1',
        "end = len(data)",
    ),
    Fault(
        "temporary file stays", "files", "temporary.unlink(missing_ok=True)", "temporary.exists()"
    ),
    Fault(
        "files for the owner only",
        "files",
        "temporary.chmod(_mode(destination))",
        "temporary.chmod(_mode(destination) & 0o600)",
    ),
    Fault(
        "the name none read as missing",
        "files",
        'keep_default_na=False, na_values=[""], dtype=texts',
        "dtype=texts",
    ),
    Fault(
        "a method of one's own known without its defaults",
        "journals",
        "    yield function.__defaults__\n",
        "    yield None\n",
        "tests/experiments/test_own_code.py",
    ),
    Fault(
        "a method of one's own known without what it reads",
        "journals",
        "{} if method.needs is None else asdict(method.needs)",
        "{}",
        "tests/experiments/test_own_code.py",
    ),
    # ---- grids ----------------------------------------------------------------------------------
    Fault(
        "a cell in no part",
        "grids",
        "cell.hash for cell in self.cells)[i - 1 :: n])",
        "cell.hash for cell in self.cells)[i::n])",
    ),
    Fault(
        "a grid written over that of a quicker run",
        "grids",
        "self.folder.create(_MANIFEST",
        "self.folder.write(_MANIFEST",
    ),
    Fault(
        "finished cells again",
        "grids",
        "for one in mine if one.hash not in done}",
        "for one in mine}",
    ),
    Fault(
        "a table without some cells taken for a whole one",
        "grids",
        'frame["settings_hash"] += " partial"',
        'frame["settings_hash"] += ""',
    ),
    # ---- escaping -------------------------------------------------------------------------------
    Fault("text is markup", "escaping", "return escape(_UNREADABLE", "return str(_UNREADABLE"),
    Fault(
        "data can end its script block",
        "escaping",
        'return written.replace("<", "\\\\u003c")',
        "return written",
    ),
    Fault(
        "paths can end their script block",
        "escaping",
        "data = html.data(traces)",
        "data = str(html.json.dumps(traces))",
    ),
    Fault("dollars are TeX to plotly", "escaping", ', ("$", "&#36;")):', "):"),
    # ---- the command line -----------------------------------------------------------------------
    Fault(
        "negative numbers are options",
        "command line",
        '(not rest[0].startswith("-") or _NEGATIVE.match(rest[0]))',
        '(not rest[0].startswith("-"))',
    ),
    Fault(
        "a range of layers without its end",
        "command line",
        "several = range(int(first), int(last) + 1)",
        "several = range(int(first), int(last) + (match is None or match[2] is None))",
    ),
    Fault(
        "--layers not handed on",
        "command line",
        "target=wanted, layers=chosen, progress=False",
        "target=wanted, progress=False",
    ),
    Fault(
        "check ends like a crash",
        "command line",
        "typer.Exit(3)",
        "typer.Exit(1)",
        "tests/cli/test_cli_check.py",
    ),
    Fault(
        "bad input ends like a crash",
        "command line",
        "else 2 if expected else 1",
        "else 1",
    ),
    Fault("--escapes halves no backslash", "command line", r'r"\\[nt\\]"', r'r"\\[nt]"'),
    Fault(
        "--natural qa for the other kind",
        "command line",
        '== "qa" and task.kind == "natural"',
        '== "qa" and task.kind == "icl"',
    ),
    Fault(
        "gradients of shared keys are those of one query head",
        "vectors",
        "per_query_head.unflatten(2, (-1, share)).sum(3)",
        "per_query_head.unflatten(2, (-1, share))[:, :, :, 0]",
        "tests/run/test_vectors.py",
    ),
    Fault(
        "queries stay scaled where the model scales them first",
        "vectors",
        "times = product.factor / site.need_scale()",
        "times = 1.0",
        "tests/run/test_vectors.py",
    ),
    Fault(
        "vectors keep float16's factor of the loss",
        "vectors",
        'scaled = loss_scale != 1 and kind.endswith("_grad")',
        "scaled = False",
        "tests/run/test_vectors.py",
    ),
    Fault(
        "vectors of keys are taken for tokens of the queries' side",
        "vectors",
        "return self.key_side if kind in _OF_KEYS else self.query_side",
        "return self.query_side",
        "tests/model/test_architectures.py",
    ),
    Fault(
        "vectors of padding are kept",
        "vectors",
        "laid_out = laid_out.where(real.reshape",
        "laid_out.where(real.reshape",
        "tests/run/test_vectors.py",
    ),
    Fault(
        "a weight's gradient is that of the head's own index in a group",
        "vectors",
        'at = site.kv_group(index) if weight in ("W_K", "W_V") else index',
        'at = min(index, site.n_key_value_heads - 1) if weight in ("W_K", "W_V") else index',
        "tests/run/test_weight_gradients.py",
    ),
    Fault(
        "a step of descent climbs",
        "steps",
        'lens, size = as_lens(model), real("eta", eta)',
        'lens, size = as_lens(model), -real("eta", eta)',
        "tests/steps/test_gradient_step.py",
    ),
    Fault(
        "a step goes along the sum of the losses",
        "steps",
        "n = ra.batch_size if ra.loss.ndim or not ra.has_batch_dim else 1",
        "n = 1",
        "tests/steps/test_gradient_step.py",
    ),
    Fault(
        "a step of W_O is taken of a z that is not the last",
        "steps",
        "not (moved_before or self._follows(given.detach(), z.detach()))",
        "not (moved_before or True)",
        "tests/steps/test_gradient_step.py",
    ),
    Fault(
        "first order of a pair leaves out that its key moves",
        "steps",
        "predicted = (query_after - query) @ key.T + query @ (key_after - key).T",
        "predicted = (query_after - query) @ key.T",
        "tests/steps/test_pulls.py",
    ),
    Fault(
        "weights that round what they read are stepped",
        "steps",
        "if error <= rounding(dtype) * float(given[0].float().norm()):",
        'if error <= float("inf"):',
        "tests/steps/test_steps_models.py",
    ),
    Fault(
        "a hook of the graph holds a tensor of it",
        "vectors",
        "return right.unflatten(0, (n, site.n_heads))",
        "return right.unflatten(0, (z.shape[0], site.n_heads))",
        "tests/run/test_vectors.py",
    ),
    Fault(
        "a knockout is not renormalised",
        "knockouts",
        "torch.where(pattern >= 1, 0.0, -step / (1 - pattern))",
        "torch.where(pattern >= 1, 0.0, -step)",
        "tests/knockouts/test_predict.py",
    ),
    Fault(
        "a cut forgets the changes before it",
        "knockouts",
        "return now.pattern if ledger.pattern is None else now.pattern + ledger.pattern",
        "return now.pattern",
        "tests/knockouts/test_knockout_hooks.py",
    ),
    Fault(
        "what a failed pass has changed counts in the next",
        "knockouts",
        "_ledgers.pop(_storage(values), None)",
        "_ledgers.get(_storage(values), None)",
        "tests/knockouts/test_knockout_hooks_observed.py",
    ),
    Fault(
        "an attention sink gets nothing of what is cut",
        "knockouts",
        "left = kept.sum(dim=-1, keepdim=True) + lacking(pattern)",
        "left = kept.sum(dim=-1, keepdim=True)",
        "tests/knockouts/test_knockout_hooks_observed.py",
    ),
    Fault(
        "rows of which nothing is left become 0",
        "knockouts",
        "meant = meant & (left > 0)",
        "meant = meant & (left >= 0)",
        "tests/knockouts/test_knockout_hooks.py",
    ),
    Fault(
        "cut positions count padding",
        "knockouts",
        'align="left", mask=self._mask, layer=site.layer',
        'align="left", mask=None, layer=site.layer',
        "tests/knockouts/test_knockout_hooks.py",
    ),
    Fault(
        "the strongest edges are the most positive",
        "knockouts",
        "size = values.abs().nan_to_num_()",
        "size = values.clone().nan_to_num_()",
        "tests/knockouts/test_knockout_edges.py",
    ),
    Fault(
        "a set without an end ends with the prompt",
        "knockouts",
        "return Positions(tuple(some), n) if open_ended else Positions(tuple(some))",
        "return Positions(tuple(some))",
        "tests/knockouts/test_knockout_hooks_generate.py",
    ),
    # ---- vectors as tokens ----------------------------------------------------------------------
    Fault(
        "steps point where the loss rises",
        "vocabulary",
        "recipe.vector, example) * recipe.sign",
        "recipe.vector, example)",
        "tests/vocabulary/test_vocabulary.py",
    ),
    Fault(
        "the norm in front of a layer is left out",
        "vocabulary",
        "return weights.norms[recipe.weight].back(found @ weight.T)",
        "return found @ weight.T",
        "tests/vocabulary/test_vocabulary.py",
    ),
    Fault(
        "a key/value head is read as the query head of its number",
        "vocabulary",
        "return site.kv_group(index) if name in _SHARED else index",
        "return index % site.n_key_value_heads if name in _SHARED else index",
        "tests/vocabulary/test_vocabulary.py",
    ),
    Fault(
        "tokens are scored without the final norm's gain",
        "vocabulary",
        "self.norm(directions.to(self.weights)) @ self.weights",
        "directions.to(self.weights) @ self.weights",
        "tests/vocabulary/test_head_weights.py",
    ),
    Fault(
        "weights are not compared with what the layer gives",
        "vocabulary",
        "if a.shape[1] % v.shape[2] or not fits(per_head, attention_output(a, v)):",
        "if a.shape[1] % v.shape[2]:",
        "tests/vocabulary/test_head_weights.py",
    ),
    # ---- attention in blocks of rows -----------------------------------------------------------
    Fault(
        "keys get the gradient of one block only",
        "long prompts",
        "whole.narrow(dim, 0, start).add_(one)",
        "whole.narrow(dim, 0, start).copy_(one)",
        "tests/model/test_rows.py",
    ),
    Fault(
        "what is as long as the prompt is taken for tokens",
        "long prompts",
        "_LENGTHS = (7, 5)",
        "_LENGTHS = (6,)  # as a tiny head is wide",
        "tests/model/test_rows.py",
    ),
    Fault(
        "norms are those of the last block",
        "long prompts",
        "norms = torch.hypot(norms, self._norms[kind, layer].to(norms.device))",
        "norms = norms + 0 * self._norms[kind, layer].to(norms.device)",
        "tests/model/test_rows.py",
    ),
)


# ---- where a fault goes, and which tests are near ------------------------------------------------


def file_of(fault: Fault, root: Path = ROOT) -> Path:
    """The file, below `root`, that holds the text of a fault.

    Raises:
        LookupError: it is not there exactly once.
    """
    files = [path for ext in ("py", "js", "css") for path in (root / SOURCE).rglob(f"*.{ext}")]
    counts = {path: path.read_text(encoding="utf-8").count(fault.old) for path in files}
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) != 1:
        where = ", ".join(str(path.relative_to(root)) for path in found) or "no file"
        raise LookupError(
            f"{fault.name!r}: its text is there {sum(counts.values())} times ({where}); once is "
            f"needed. Write it as the code is now: {fault.old!r}"
        )
    return found[0].relative_to(root)


def nearest(fault: Fault, root: Path) -> list[str]:
    """Test files: the one that a fault names, then those that name most of what its code does."""
    path = root / file_of(fault, root)
    text = path.read_text(encoding="utf-8")
    weights = Counter(dict.fromkeys(re.findall(r"[a-z]\w{3,}", fault.old), 1.0))
    weights[path.stem] += 2.0
    if path.suffix == ".py":
        line = text[: text.index(fault.old)].count("\n") + 1
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                around = node.lineno <= line <= (node.end_lineno or 0)
                weights[node.name] += 5.0 if around else 1.0
    files = sorted((root / "tests").rglob("test_*.py"))
    tests = {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}
    scores = dict.fromkeys(tests, 0.0)

    def count(name: str, weight: float, texts: dict[str, str]) -> None:
        pattern = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])")
        counts = {test: len(pattern.findall(texts[test])) for test in texts}
        rarity = 1 / max(1, sum(map(bool, counts.values())))
        for test, n in counts.items():
            scores[test] += weight * rarity * n**0.5

    for name, weight in weights.items():
        count(name, weight, tests)
    # Tests are named as sentences, and so are faults.
    titles = {t: " ".join([t, *re.findall(r"def test_(\w+)", tests[t])]) for t in tests}
    for word in re.findall(r"[a-z]{4,}", f"{fault.name} {fault.kind}".lower()):
        count(word, 2.0, titles)
    if fault.near:
        scores[fault.near] = math.inf
    return sorted(scores, key=lambda test: -scores[test])[:N_NEAREST]


# ---- copies of the working tree ------------------------------------------------------------------


@contextmanager
def a_folder(prefix: str) -> Generator[Path, None, None]:
    """A temporary folder that others may read, as tests do that run code as another user."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def copy_of_working_tree(destination: Path) -> Path:
    """Copy what git tracks, and what is new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)
    return destination


def plant(fault: Fault, copy: Path) -> None:
    """Write a fault into a copy."""
    path = copy / file_of(fault, copy)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def failing(copy: Path, arguments: Sequence[str]) -> list[str]:
    """Run tests in a copy and give those that fail, by their ids.

    Raises:
        RuntimeError: pytest did not run them.
    """
    shutil.rmtree(copy / ".pytest_cache", ignore_errors=True)
    path = os.pathsep.join(filter(None, [str(copy / "src"), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * MINUTES,
        )
    except subprocess.TimeoutExpired:
        return [NO_END]
    remembered = copy / ".pytest_cache" / "v" / "cache" / "lastfailed"
    failed = list(json.loads(remembered.read_text())) if remembered.is_file() else []
    if (done.returncode == 0) == bool(failed) or done.returncode > 2:
        raise RuntimeError(f"pytest {' '.join(arguments)} ended with {done.stdout[-2000:]}")
    return failed


# ---- all faults ----------------------------------------------------------------------------------


class Results:
    """Which tier found which fault, on disk line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._found = [json.loads(line) for line in lines]

    def add(self, **result: Any) -> None:
        """Keep a result."""
        with self._lock:
            self._found.append(result)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result, ensure_ascii=False) + "\n")

    def tiers(self, fault: Fault) -> dict[str, str | None]:
        """The test that found a fault in each tier that was run; None where none did."""
        mine = (one for one in self._found if one.get("fault") == fault.name)
        return {one["tier"]: one["test"] for one in mine}

    def found_by(self, fault: Fault) -> tuple[str, str] | None:
        """Tier and test that found a fault."""
        found = ((tier, test) for tier, test in self.tiers(fault).items() if test)
        return next(found, None)

    def sound(self) -> dict[str, bool]:
        """Whether a test that found a fault passes without one."""
        return {one["without"]: one["passes"] for one in self._found if "without" in one}

    def not_confirmed(self, faults: Sequence[Fault]) -> list[str]:
        """Tests near a fault that found it, and have not been run without one."""
        found = {test for f in faults for tier, test in self.tiers(f).items() if tier in NEAREST}
        return sorted(test for test in found if test not in (None, NO_END, *self.sound()))


def look_near(fault: Fault, *, tier: str, clean: Path, results: Results) -> None:
    """Run the nearest test files against one fault."""
    arguments = [*ALONE, *NEAREST[tier], *nearest(fault, clean)]
    keep(tier, fault, lambda copy: failing(copy, arguments), clean, results)


def look_everywhere(
    faults: Sequence[Fault], *, tier: str, clean: Path, results: Results, jobs: int
) -> None:
    """Run a whole tier once against many faults together; what fails, against each alone."""
    runs = [DEFAULT_RUN] if tier == "default" else CI_RUNS
    with a_folder("planted_") as folder:
        copy = shutil.copytree(clean, folder / "copy")
        planted: list[Fault] = []
        for fault in faults:
            with suppress(LookupError):  # one that another has put its own text next to
                plant(fault, copy)
                planted.append(fault)
        say(f"{len(planted)} faults together: {tier}")
        again = [tests_again(run, failing(copy, run), clean) for run in runs]

    def alone(copy: Path) -> list[str]:
        found = (failing(copy, arguments) for arguments in again if arguments)
        return next(filter(None, found), [])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda fault: keep(tier, fault, alone, clean, results), planted))
    if rest := [fault for fault in faults if fault not in planted]:
        look_everywhere(rest, tier=tier, clean=clean, results=results, jobs=jobs)


def tests_again(run: Sequence[str], failed: Sequence[str], clean: Path) -> list[str]:
    """Arguments of pytest for what failed in a run because of the faults; none for nothing."""
    if NO_END in failed:
        return ["-x", *run]
    options = [argument for argument in run if argument.startswith("-")]
    anyway = failing(clean, [*ALONE[1:], *options, *failed]) if failed else []
    tests = [test for test in failed if test not in anyway]
    return [*ALONE, *options, *tests] if tests else []


def keep(
    tier: str, fault: Fault, run: Callable[[Path], list[str]], clean: Path, results: Results
) -> None:
    """Keep the first test that fails in a copy with one fault, or that none does."""
    start = time.perf_counter()
    with a_folder("planted_") as folder:
        copy = shutil.copytree(clean, folder / "copy")
        plant(fault, copy)
        test = next(iter(run(copy)), None)
    seconds = round(time.perf_counter() - start, 1)
    results.add(fault=fault.name, tier=tier, test=test, seconds=seconds)
    say(f"{fault.name}: {test or f'not found by {tier}'} ({seconds:.0f} s)")


def confirm(faults: Sequence[Fault], clean: Path, results: Results) -> None:
    """Run what found these faults, in the nearest test files, without a fault."""
    if tests := results.not_confirmed(faults):
        failed = failing(clean, [*ALONE[1:], "--every-model", *tests])
        for test in tests:
            results.add(without=test, passes=test not in failed)


def show(faults: Sequence[Fault], results: Results) -> bool:
    """Print what found each fault; gives whether all were found by tests that pass otherwise."""
    counts: Counter[str] = Counter()
    rows: list[tuple[str, str, str]] = []
    for fault in faults:
        tier, test = results.found_by(fault) or ("nothing", "")
        if results.sound().get(test) is False:
            tier, test = "unclear", f"{test}, which fails without a fault too"
        tier = IN_SHORT.get(tier, tier)
        counts[tier] += 1
        rows.append((fault.kind, fault.name, f"{tier}: {test}" if test else tier))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for kind, name, found in rows:
        say(f"{kind:{widths[0]}}  {name:{widths[1]}}  {found}")
    say(
        f"{len(faults)} faults: {counts['default run']} found by the default run, "
        f"{counts['ci']} by what only CI runs, {counts['nothing']} by nothing that was run, "
        f"{counts['unclear']} unclear."
    )
    return counts["default run"] + counts["ci"] == len(faults)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Read the command line; ends with 1 if a fault was not found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", help="part of a name or kind; several: again")
    parser.add_argument("--list", action="store_true", help="show faults, files and nearest tests")
    parser.add_argument("--tier", choices=TIERS, default="default", help="run up to this one")
    parser.add_argument("--out", type=Path, help="JSON lines; a later call goes on from them")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    options = parser.parse_args()
    wanted = options.only or [""]
    faults = [
        fault
        for fault in FAULTS
        if any(word in text for word in wanted for text in (fault.name, fault.kind))
    ]
    wrong: list[str] = []
    for fault in faults:
        try:
            path = file_of(fault)
        except LookupError as error:
            wrong.append(str(error))
            continue
        if fault.near and not (ROOT / fault.near).is_file():
            wrong.append(f"{fault.name!r}: there is no {fault.near}, which is said to be near")
        if options.list:
            say(f"{fault.kind}: {fault.name}\n  {path}; {' '.join(nearest(fault, ROOT))}")
    if wrong or not faults:
        say("\n".join(wrong) or f"no fault has {wanted} in its name or kind")
        return 2
    if options.list:
        return 0
    with a_folder("clean_") as folder:
        clean = copy_of_working_tree(folder / "tree")
        results = Results(options.out or folder / "results.jsonl")
        for tier in TIERS[: TIERS.index(options.tier) + 1]:
            left = [f for f in faults if not results.found_by(f) and tier not in results.tiers(f)]
            if tier in NEAREST:
                look = partial(look_near, tier=tier, clean=clean, results=results)
                with ThreadPoolExecutor(options.jobs) as pool:
                    list(pool.map(look, left))
                confirm(faults, clean, results)
            elif left:
                look_everywhere(left, tier=tier, clean=clean, results=results, jobs=options.jobs)
        return 0 if show(faults, results) else 1


if __name__ == "__main__":
    sys.exit(main())
