"""`ra-lens results`: what is there of grids whose cells are kept in folders, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ra_lens.cli import options as opt
from ra_lens.errors import BadInput, UnfinishedGrid
from ra_lens.files import check_output, user_path

if TYPE_CHECKING:
    from ra_lens.experiments.grid import Grid

_LISTED = 10  # failed or missing cells in a terminal


def results(
    folders: Annotated[
        list[str], typer.Argument(help="Folders or addresses that experiments wrote (--out).")
    ],
    merge: Annotated[
        Path | None, typer.Option(help="Write the table of all cells: .parquet or .csv.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Merge what is there, though cells are not.")
    ] = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,  # noqa: ARG001 read by `Command`
) -> None:
    """Show how far grids are: cells done, missing and failed, and why; and make their table."""
    from ra_lens.cli import show_results as show
    from ra_lens.tables import TABLE, write_results

    if merge is not None:
        merge = user_path(merge)
        check_output(merge, TABLE)
    complete = tell_grids(folders, as_json=as_json, out=merge)
    if merge is not None and (complete or partial):
        write_results(_merged(folders), merge)
        if not as_json:
            show.print_files(merge)
    elif merge is not None:
        raise UnfinishedGrid(
            f"cannot write {merge}: cells are missing or failed. Give the commands that compute "
            "them again, or --partial for a table without them."
        )
    if not complete:
        raise typer.Exit(4)


def tell_grids(folders: Sequence[str], *, as_json: bool, out: Path | None = None) -> bool:
    """Print what is there of some grids; give whether all is."""
    from ra_lens.cli import show
    from ra_lens.experiments.grid import read_grid

    found = [(folder, _state(read_grid(folder))) for folder in folders]
    if as_json:
        grids = [{"folder": folder, **state} for folder, state in found]
        show.print_json({"grids": grids, "out": None if out is None else str(out)})
    else:
        console = show.new_console()
        for folder, state in found:
            counts = f"{state['done']} of {state['cells']} cells done"
            for name in ("failed", "missing"):
                if state[name]:
                    counts += f", {len(state[name])} {name}"
            console.print(
                f"{folder}: {state['experiment']} of {state['model']}: {counts}",
                soft_wrap=True,
                markup=False,
            )
            lines = [f"failed: {cell}: {error}" for cell, error in state["failed"].items()]
            lines += [f"missing: {cell}" for cell in state["missing"]]
            for line in lines[:_LISTED]:
                console.print(f"  {line}", soft_wrap=True, markup=False)
            if len(lines) > _LISTED:
                console.print(f"  and {len(lines) - _LISTED} more; --json lists all")
    return all(state["done"] == state["cells"] for _, state in found)


def _state(grid: Grid) -> dict[str, Any]:
    done, failures = grid.done(), grid.failures()
    return {
        "experiment": grid.settings["experiment"],
        "model": grid.settings["model"],
        "cells": len(grid.cells),
        "done": len(done),
        "failed": {cell.name: failure.error for cell, failure in failures.items()},
        "missing": [c.name for c in grid.cells if c.hash not in done and c not in failures],
    }


def _merged(folders: Sequence[str]) -> Any:
    """The table of the cells that are done; what lacks some is not taken for a finished run."""
    import pandas as pd

    from ra_lens.experiments.grid import read_grid

    grids = [read_grid(folder) for folder in folders]
    kinds = list(dict.fromkeys(str(grid.settings["experiment"]) for grid in grids))
    if len(kinds) > 1:
        raise BadInput(
            f"found grids of {' and '.join(kinds)}; a table has the rows of one experiment. Merge "
            "the folders of each by themselves."
        )
    frames: list[pd.DataFrame] = []
    for grid in grids:
        done = grid.done()
        frame = grid.frame(cell for cell in grid.cells if cell.hash in done)
        if len(done) < len(grid.cells) and len(frame):
            frame["settings_hash"] += " partial"
        frames.append(frame)
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
