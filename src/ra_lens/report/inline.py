"""The explorer in a notebook: a frame that is part of the cell's output, and keeps to itself.

The frame is an `<iframe>` whose page stands in the output, so that a saved notebook, or its HTML,
shows it without Python and without a network. It is sandboxed: the page in it cannot read the
notebook, nor ask for anything. Two things pass between them: how tall it is, and whether the
notebook is dark. Where a viewer leaves frames out (a notebook that is not trusted, a code host),
the cache's text stands in its place.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from ra_lens import html
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.head_maps import head_of_example
from ra_lens.head_names import HeadScore
from ra_lens.numbers import Real, Whole, Wholes, whole_or_none
from ra_lens.report.explorer import Shown, explorer, pack
from ra_lens.report.view import Sign, View, heading_of, how_to_read, read_view

MOST_EXAMPLES = 10
"""So many prompts are in a frame where nobody says which."""

_HEIGHT = 640  # until the frame has said its own
_BESIDE = 256  # bytes that a map takes beside its numbers, at most: its name, its place, its tags
_TEXTS = 1024  # bytes of what is said of maps once there are any, at most


def inline_report(
    ra: RACache,
    *,
    examples: Wholes | None = None,
    sign: Sign = "descent",
    top: Whole = 10,
    max_tokens: Whole = 128,
    max_megabytes: Real = 3.0,
    height: Whole | None = None,
) -> str:
    """Give the explorer of a cache as HTML for one cell of a notebook.

    `RACache.show` displays it, and so does a cache in the last line of a cell. Of a cache without
    maps (`store="norms"`, `"mean"`) it has the grid of heads.

    Args:
        ra: A cache after its backward pass.
        examples: Which examples. Default: the first 10.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        top: So many heads are numbered in the grid, and so many edges of each prompt listed.
        max_tokens: Of a longer prompt the maps show the last so many tokens.
        max_megabytes: The size of the whole. Where all heads' maps take more, those with the
            largest norms have theirs, and the frame says how many.
        height: Of the frame, in pixels; what is longer scrolls in it. Default: that of its content.

    Returns:
        HTML that asks the network for nothing, of at most `max_megabytes`.

    Raises:
        BadInput: there is no such example, an option below 1, or a size that is too small for the
            tokens alone.
        NotStored: there was no backward pass yet.
    """
    if not ra.batch_size:
        raise NotStored("this cache is empty: run the backward pass first.")
    view = read_view(
        ra,
        examples=examples,
        sign=sign,
        top=top,
        max_tokens=max_tokens,
        max_megabytes=max_megabytes,
    )
    height = whole_or_none("height", height, least=1)
    heads = tuple(ra.top_heads(len(ra.layers) * ra.n_heads))
    chosen = view.examples if examples is not None else view.examples[:MOST_EXAMPLES]
    while True:
        bare = Shown(chosen, heads, (), view.max_tokens)
        size = len(_cell(ra, bare, view, height).encode()) + _TEXTS
        if size <= view.max_bytes / (2 if len(chosen) > 1 else 1):
            break
        if len(chosen) == 1:
            raise BadInput(
                f"found max_megabytes={max_megabytes}; the frame takes {size / 1e6:.2g} MB "
                "without any map. Give more."
            )
        chosen = chosen[: (len(chosen) + 1) // 2]  # long prompts: some space is for their maps
    mapped = _that_fit(ra, bare, view.max_bytes - size)
    return _cell(ra, Shown(chosen, heads, mapped, view.max_tokens), view, height)


def cell_of(ra: RACache) -> str | None:
    """Give what a notebook shows of a cache in the last line of a cell; None: its text alone.

    Nobody asked for this by name, so it never raises: what went wrong stands below the text.
    """
    try:
        return inline_report(ra)
    except NotStored:
        return None
    except Exception as error:
        return f"<pre>{html.text(f'{ra!r}')}\n\nNot drawn: {html.text(str(error))}</pre>"


def display(ra: RACache, **options: Any) -> None:
    """Show a cache in the notebook that this runs in; elsewhere, or if empty, print its text."""
    text = repr(ra)
    try:
        cell = inline_report(ra, **options)
    except NotStored:
        cell = None
    notebook: Any = sys.modules.get("IPython")
    shell = notebook and notebook.get_ipython()
    if cell is None or shell is None or "text/html" not in shell.display_formatter.active_types:
        sys.stdout.write(f"{text}\n")
        return
    import_module("IPython.display").display({"text/plain": text, "text/html": cell}, raw=True)


def _that_fit(ra: RACache, shown: Shown, max_bytes: int) -> tuple[HeadScore, ...]:
    """Give the heads whose maps are stored and fit, largest norms first."""
    found: list[HeadScore] = []
    for head in shown.heads:
        if ("ra", head.layer) not in ra or ("pattern", head.layer) not in ra:
            continue
        for example in shown.examples:
            maps = head_of_example(ra, head, example=example, max_tokens=shown.max_tokens)
            max_bytes -= _BESIDE + len(pack(maps))
        if max_bytes < 0:
            break
        found.append(head)
    return tuple(found)


def _cell(ra: RACache, shown: Shown, view: View, height: int | None) -> str:
    read, always, blocked = how_to_read(view.sign)
    drawn = explorer(ra, shown, sign=view.sign, top=view.top, patched=(), note=_note(ra, shown))
    style, inside, outside, main = (
        html.resource("ra_lens.report", name)
        for name in ("frame.css", "frame_inside.js", "frame_outside.js", "explorer.js")
    )
    page = html.page(
        heading_of(ra),
        [drawn, *(map(html.note, (f"{read} {always}", blocked)) if shown.mapped else ())],
        styles=[html.resource("ra_lens.report", "explorer.css"), style],
        scripts=[main, inside],
    )
    fits = 'data-fits="true" ' if height is None else ""
    # In single quotes, as data has many double ones, which would take six bytes each.
    quoted = page.replace("&", "&amp;").replace("'", "&#39;")
    return (
        f'<div><pre>{html.text(repr(ra))}</pre><iframe class="ra-lens" {fits}'
        f'title="{html.text(heading_of(ra))}" sandbox="allow-scripts" style="display:block;'
        f"width:100%;height:{height or _HEIGHT}px;border:0\" srcdoc='{quoted}'></iframe></div>"
        f"<script>{outside}</script>"
    )


def _note(ra: RACache, shown: Shown) -> str:
    said: list[str] = []
    if len(shown.examples) < ra.batch_size:
        said.append(
            f"Shown: {len(shown.examples)} of {ra.batch_size} prompts; ra.show(examples=[…]) "
            "chooses others."
        )
    if ra.store != "maps":
        said.append(f"Norms only: the maps were not kept (store={ra.store!r}).")
    elif not any(("ra", layer) in ra and ("pattern", layer) in ra for layer in ra.layers):
        said.append("Norms only: this cache does not hold both R and the attention of a layer.")
    elif not shown.mapped:
        said.append("Norms only: no map fits into this size; max_megabytes= gives it more.")
    elif shown.cut:
        said.append(
            f"Here are the maps of {len(shown.mapped)} heads with the largest norms; the other "
            f"{shown.cut} are shown by their norms only. ra.to_html('report.html') writes all that "
            "were kept."
        )
    return " ".join(said)
