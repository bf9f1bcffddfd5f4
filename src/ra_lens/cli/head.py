"""`ra-lens head`: all there is to say of one head on one prompt.

What it computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ra_lens.cli import options as opt
from ra_lens.files import PAGE, check_output


def head(
    head: Annotated[
        str, typer.Argument(metavar="HEAD", help="The head, such as L23H4; or top, the strongest.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to run on; - reads standard input.")
    ],
    model: opt.ModelOption = opt.DEMO,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="What the loss asks for, leading space included: ' Paris'. Default: the model's "
            "own top prediction.",
        ),
    ] = None,
    escapes: opt.EscapesOption = False,
    top: Annotated[int, typer.Option(min=1, help="Number of edges and of pairs to list.")] = 8,
    bos: opt.BosOption = None,
    no_bos: opt.NoBosOption = False,
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    allow_pickle: opt.PickleOption = False,
    as_json: opt.JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write its page: maps, latent space, all tables; one HTML file.",
        ),
    ] = None,
    debug: opt.DebugOption = False,
) -> None:
    """Tell all of one head: edges, the pairs it moves, its words, its part in the gradient."""
    from ra_lens.cli import session, show_head
    from ra_lens.head_names import layer_and_index
    from ra_lens.memory import offering
    from ra_lens.model import as_lens
    from ra_lens.prompts import read_prompts
    from ra_lens.report.head_facts import head_facts
    from ra_lens.report.head_page import write_found
    from ra_lens.run import run_with_ra

    session.prepare(model, device)
    if head != "top":
        layer_and_index(head)  # a slip of the keyboard is told before a model is loaded
    text = session.read_text(prompt, escapes=escapes)
    wanted = None if target is None else session.read_text(target, escapes=escapes)
    front = session.read_bos(bos, no_bos=no_bos)
    if output is not None:
        check_output(output, PAGE)
    for hint in session.hints(text, wanted, escapes=escapes):
        session.warn("note", hint)
    loaded = session.load(model, kind, device, debug=debug, allow_pickle=allow_pickle)
    session.warn_of_unknown_words(loaded, text)
    with session.quiet(debug=debug):
        read = read_prompts(as_lens(loaded), [text], prepend_bos=front)
        with offering():
            _, ra = run_with_ra(loaded, read, target=wanted, vectors=True, progress=False)
        own = ra.top_heads(1)[0] if head == "top" else head
        found = head_facts(ra, loaded, own, top=top)
    ra = ra.to("cpu")
    written = None
    if output is not None:
        given = [("--model", model), ("--prompt", text), ("--target", wanted), ("--bos", bos)]
        words = [
            word for name, value in [*given, ("--kind", kind)] if value for word in (name, value)
        ]
        command = shlex.join(["ra-lens", "head", head, *words, *["--no-bos"] * no_bos])
        written = write_found(ra, found, output, command=command)
    if as_json:
        show_head.print_json(ra, loaded, text, found, page=written)
        return
    show_head.print_head(ra, loaded, found)
    if written is not None:
        typer.echo(f"Page: {written}")
