"""Results kept as JSON, one file per class and version, and the page rendered from them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from .configs import ARCHITECTURES
from .expectations import MEANING
from .variants import VARIANTS

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "models"
PAGE = DOCS / "models.md"

Kind = Literal["TransformerBridge", "HookedTransformer"]
Records = dict[str, dict[str, Any]]

_KEPT = (
    "status",
    "reason",
    "sites",
    "maps",
    "patches",
    "route",
    "foretold",
    "knockouts",
    "vectors",
    "no_vectors",
    "scales",
    "scale",
    "compat",
    "bfloat16",
    "float16",
    "heads",
    "padding_left",
    "padding_right",
    "by_length",
)


def file_name(kind: Kind) -> str:
    """File of the installed TransformerLens: `TransformerBridge-4.3.json`."""
    return f"{kind}-{'.'.join(version('transformer-lens').split('.')[:2])}.json"


def write(kind: Kind, records: Records) -> Path:
    """Keep the records of one class under the installed TransformerLens."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(_short(record), ensure_ascii=False)}"
        for name, record in records.items()
    ]
    head = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
    text = f'{{\n "versions": {json.dumps(head)},\n "records": {{\n'
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / file_name(kind)
    path.write_text(text + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")
    return path


def _short(record: dict[str, Any]) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(v) for v in value]
        return float(f"{value:.2g}") if isinstance(value, float) else value

    kept = {k: rounded(record[k]) for k in _KEPT if record.get(k) not in (None, "", [])}
    # Scales are exact numbers, not errors; one for all layers is said once.
    scales = record.get("scales") or []
    if scales:
        kept["scales"] = [round(c, 4) for c in (scales[:1] if len(set(scales)) == 1 else scales)]
    return kept


def read(kind: Kind) -> dict[str, tuple[dict[str, str], Records]]:
    """Versions and records of a class by TransformerLens version, the newest first."""
    found: dict[str, tuple[dict[str, str], Records]] = {}
    for path in FOLDER.glob(f"{kind}-*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem.split("-")[1]] = data["versions"], data["records"]
    newest_first = sorted(found, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
    return {v: found[v] for v in newest_first}


# ---- the page -----------------------------------------------------------------------------------

_HEAD = """# Models

Every architecture below is built small and random, with Hugging Face's own code, loaded into
TransformerLens, and compared with Hugging Face's own model. This page is written by

```bash
PYTHONPATH=tests:tests/helpers python -m conformance    # once in each environment; see constraints/
```

and checked by `python -m pytest tests/conformance --every-model`. How to find out about a model of
your own: `ra_lens.check_model(model)`.

- **Maps**: R divided by the softmax scale, against the gradient of the loss with respect to the
  softmax input in Hugging Face's eager model (float64 where the model runs in it). Relative error
  (Frobenius norm) of the worst layer; the limit is 1e-5. Of layers that run several times in one
  forward pass (hrm_text) the last time counts.
- **Patches**: a random map added with `patch_hooks`, against the same map added to Hugging Face's
  softmax output. Error of the logits relative to what the map changed in them; the limit is 1e-4.
  *Route*: through `pattern`, or through `z` where TransformerLens only shows the pattern.
- **Knockouts**: first what a cache foretells of cutting edges, single ones and a set, renormalised
  and not, and of weakening one: against central differences of the loss of Hugging Face's model in
  float64, whose softmax output is moved that way (against its gradient, where that model does not
  run in float64). Error relative to what the edges do one by one; the limit is 1e-5. Then that of
  the logits with such edges cut by `knockout_hooks`, against the same cut of Hugging Face's
  softmax output, relative to what the cut changed; the limit is 1e-4. Cuts take the route of
  patches.
- **Vectors**: queries, keys, values and the gradients there (`vectors=True`), against what Hugging
  Face's own code multiplies and autograd there, and so the paper's equations 13, 14, 18 and 19,
  where neither a cap nor a gate stands between; gradients of W_Q, W_K, W_V and W_O against
  autograd's for the weights. Worst relative error; the limit is 1e-5, or three times the error of
  Hugging Face's own gradient in float32.
- **Scale**: the softmax scale of each layer (once, if all have the same), the factor measured
  between the products of queries and keys and the softmax input.
- **bf16**, **fp16**: error of R of a model of that type, against R in float32. Where a router picks
  experts, or a mask picks keys, rounding can change the pick, and with it the map.
- **Compatibility mode**: R in it (TransformerBridge), or with processed weights
  (HookedTransformer), against R without.
- **Head masking**: a head of the first and of the last layer zeroed with
  `ra_lens.patching.masking`, against the model with their patterns set to 0; relative to what this
  changes.
- **Left padding**, **right padding**: R and loss of two prompts of different lengths in one batch,
  against each alone. *By length*: padding would change what the model computes, so they run in
  groups of one length, which `check_model` says too.

A HookedTransformer has no second implementation of its variants to compare with. There, in float64,
the maps are compared with finite differences of the loss, entry by entry, patches with the same
addition made to z, cuts with scores of −∞, or with a pattern of 0, at the edges, and vectors with
autograd at what its own code multiplies.

Numbers in brackets lead to the reasons below each table.
"""


def render() -> str:
    """The page, from the files kept."""
    parts = [_HEAD, _counts()]
    for kind, names, first in (
        ("TransformerBridge", list(ARCHITECTURES), "Architecture"),
        ("HookedTransformer", list(VARIANTS), "Variant"),
    ):
        results = read(kind)
        if results:
            parts.append(_table(kind, names, first, results))
    return "\n".join(parts)


def _counts() -> str:
    kinds: tuple[Kind, Kind] = ("TransformerBridge", "HookedTransformer")
    columns = [(kind, v, *read(kind)[v]) for kind in kinds for v in read(kind)]
    head = [f"{kind} {v}" for kind, v, _, _ in columns]
    lines = ["## Counts", "", _row(["", *head]), _row(["---", *["---:"] * len(head)])]
    counts = [Counter(r["status"] for r in records.values()) for *_, records in columns]
    for status, meaning in MEANING.items():
        if status == "failing" or any(count[status] for count in counts):
            lines.append(_row([meaning, *[str(count[status]) for count in counts]]))
    lines.append(_row(["configurations", *[str(count.total()) for count in counts]]))
    made = [
        f"{kind} {v}: transformers {x['transformers']}, torch {x['torch']}"
        for kind, v, x, _ in columns
    ]
    return "\n".join([*lines, "", f"Made with {'; '.join(made)}.", ""])


@dataclass
class _Notes:
    """Reasons, numbered in the order in which the table mentions them."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"- [{i}] {text}" for i, text in enumerate(self.texts, 1)]


def _table(
    kind: Kind, names: list[str], first: str, results: dict[str, tuple[dict[str, str], Records]]
) -> str:
    notes, versions = _Notes(), list(results)
    of = {v: records for v, (_, records) in results.items()}
    per_version = [f"{what} {v}" for what in ("Maps", "Patches") for v in versions]
    rest = ["Knockouts", "Vectors", "Scale", "bf16", "fp16", "Compatibility mode", "Head masking"]
    rest += ["Left padding", "Right padding"]
    head = [first, *per_version, *rest]
    lines = [f"## {kind}", "", _row(head), _row(["---"] * len(head))]
    for name in names:
        rows = [of[v].get(name, {"status": "not run"}) for v in versions]
        cells = [_maps(row, notes) for row in rows] + [_patches(row, notes) for row in rows]
        cells.append(_joined([_knockouts(row, notes) for row in rows], versions))
        cells.append(_joined([_vectors(row, notes) for row in rows], versions))
        cells.append(_joined([_scale(row, notes) for row in rows], versions))
        for key, spell in (
            ("bfloat16", _percent),
            ("float16", _percent),
            ("compat", _error),
            ("heads", _error),
        ):
            found = [_value(row, key, spell, notes) for row in rows]
            cells.append(_joined(found, versions))
        cells += [_joined([_padded(row, s) for row in rows], versions) for s in ("left", "right")]
        label = f"{name} ({ARCHITECTURES[name].model})" if name in ARCHITECTURES else name
        lines.append(_row([label, *cells]))
    return "\n".join([*lines, "", *notes.lines(), ""])


def _maps(row: dict[str, Any], notes: _Notes) -> str:
    if "maps" in row:
        return _error(row["maps"])
    reason = row.get("reason")
    return row["status"] + (f" {notes.number(_tidy(reason))}" if reason else "")


def _patches(row: dict[str, Any], notes: _Notes) -> str:
    value = row.get("patches")
    if value is None:
        return "–"
    if isinstance(value, str):
        return f"refused {notes.number(_tidy(value))}"
    return f"{row['route']} {_error(value)}"


def _knockouts(row: dict[str, Any], notes: _Notes) -> str:
    foretold, done = row.get("foretold"), row.get("knockouts")
    if foretold is None or done is None:
        return "–"
    if isinstance(done, str):
        return f"{_error(foretold)}, refused {notes.number(_tidy(done))}"
    return f"{_error(foretold)}, {_error(done)}"


def _vectors(row: dict[str, Any], notes: _Notes) -> str:
    if "vectors" not in row:
        return "–"
    missing = row.get("no_vectors")
    return _error(row["vectors"]) + (f" {notes.number(f'no {missing}')}" if missing else "")


def _scale(row: dict[str, Any], notes: _Notes) -> str:
    if not row.get("scales"):
        return "–"
    scales = " / ".join(f"{c:g}" for c in row["scales"])
    return scales if isinstance(row.get("scale"), float) else f"{scales} (not measured)"


def _value(row: dict[str, Any], key: str, spell: Any, notes: _Notes) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    return notes.number(_tidy(value)) if isinstance(value, str) else spell(value)


def _padded(row: dict[str, Any], side: str) -> str:
    error = row.get(f"padding_{side}")
    if error is None:
        return "–"
    return f"{_error(error)} by length" if side in row["by_length"] else _error(error)


def _joined(cells: list[str], versions: list[str]) -> str:
    """One cell for all versions; said apart where they differ in more than a number."""
    known = [cell for cell in cells if cell != "–"]
    if not known:
        return "–"
    if any("[" in cell for cell in known) and len(set(known)) > 1:
        return "; ".join(f"{v}: {cell}" for v, cell in zip(versions, cells, strict=True))
    return known[0]


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _tidy(text: str) -> str:
    return text.replace("|", "\\|")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
