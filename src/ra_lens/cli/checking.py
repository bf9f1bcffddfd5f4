"""`ra-lens check`: what ra_lens does with a model, layer by layer; imports torch."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version

from ra_lens.cli.commands import DEMO, load
from ra_lens.cli.quiet import offline, quiet
from ra_lens.cli.reading import check_device
from ra_lens.cli.show import print_json, print_line
from ra_lens.files import is_folder
from ra_lens.model import ModelKind


def check(
    model: str, *, kind: ModelKind | None, device: str | None, as_json: bool, debug: bool
) -> bool:
    """Print the report of `ra_lens.check_model`; gives whether nothing speaks against the model."""
    if model == DEMO or is_folder(model):
        offline()
    check_device(device)
    loaded = load(model, kind, device, debug=debug)
    with quiet(debug=debug):
        from ra_lens.check import check_model

        report = check_model(loaded)
    if as_json:
        made = {name: version(name) for name in ("ra-lens", "transformer-lens", "transformers")}
        print_json({**asdict(report), "ok": report.ok, "versions": made})
    else:
        print_line(str(report))
    return report.ok
