"""Tokens written from right to left stand where they belong, and turn nothing around them.

The browser is the oracle: it lays texts out by Unicode's rules, and where each part came to lie is
measured. A text for a terminal is laid out as one paragraph from left to right, as terminals do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from browser import Seen, opening
from command_line import call
from made_caches import make
from ra_lens import run_with_ra, trace_paths
from ra_lens.cache import RACache
from ra_lens.cli import show
from ra_lens.errors import BadInput
from ra_lens.figures import head_map, path_diagram, query_key_pull, token_row
from ra_lens.figures.maps import head_maps
from ra_lens.figures.style import distinct
from ra_lens.head_maps import head_of_example
from ra_lens.model import load_folder
from ra_lens.paths import TraceResult
from ra_lens.paths.result import step_text
from ra_lens.report import PatchedPrompt, Predictions, Section, Table, write_report
from ra_lens.targets import logit_diff
from ra_lens.text import isolated, label
from tiny_models import KINDS

TOKENS = ("<s>", "שלום", " مرحبا", "⟨D7⟩", " ٣", " עולם-ארוך-מאוד-מאוד-מאוד", " 4", " x")
SHOWN = [label(token).strip("\u2068\u2069") for token in TOKENS]

# Where the parts of a text came to lie, one after the other: [left, right] of each.
PLACES = """(root, parts) => {
  const nodes = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  let all = "";
  while (walker.nextNode()) {
    nodes.push([walker.currentNode, all.length]);
    all += walker.currentNode.textContent;
  }
  const place = (at) => {
    const [node, start] = nodes.findLast(([_, start]) => start <= at);
    return [node, at - start];
  };
  let from = 0;
  return parts.map((part) => {
    const at = all.indexOf(part, from);
    if (at < 0) throw new Error(`${JSON.stringify(part)} is not in ${JSON.stringify(all)}`);
    from = at + part.length;
    const range = document.createRange(), [last, end] = place(from - 1);
    range.setStart(...place(at));
    range.setEnd(last, end + 1);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0);
    return [Math.min(...boxes.map((b) => b.left)), Math.max(...boxes.map((b) => b.right))];
  });
}"""


def in_order(element: Any, parts: Sequence[str]) -> None:
    """The parts lie beside each other from left to right, none on another."""
    places = element.evaluate(PLACES, list(parts))
    for (_, right), (left, _) in pairwise(places):
        assert right <= left + 0.5, (parts, places)


def parts_of(text: str) -> list[str]:
    """Tokens, positions, and what stands between: as they should follow each other."""
    plain = re.sub("[\u2068\u2069]", "", text)
    found = re.findall(
        "|".join(map(re.escape, sorted(SHOWN, key=len)[::-1])) + r"|\(\d+\)|→", plain
    )
    assert len(found) >= 2, text
    return found


@pytest.fixture
def see(browser: Any, tmp_path: Path) -> Iterator[Callable[[Path], Seen]]:
    with opening(browser) as get:
        yield partial(get, viewport={"width": 1500, "height": 900})


@pytest.fixture
def ra() -> RACache:
    cache = make((TOKENS,))
    cache.info = replace(cache.info, targets=(TOKENS[1],), wrong=(TOKENS[2],))
    return cache


@pytest.fixture
def trace(ra: RACache) -> TraceResult:
    return trace_paths(ra, layer=2, target_pos=-3, top_beam=12)


# ---- the report ---------------------------------------------------------------------------------


@pytest.mark.every_model
def test_from_stands_left_of_to_in_a_report(
    ra: RACache, see: Callable[[Path], Seen], tmp_path: Path
) -> None:
    seen = see(write_report(ra, tmp_path / "r.html", top=6))
    met: set[str] = set()
    for head in ("0.1", "2.1"):
        seen.page.click(f"[data-head='{head}']")
        for button in seen.page.locator("#ra-cells button").all():
            said = parts_of(button.text_content())
            in_order(button, said)
            query, key = button.evaluate(
                "e => [...e.querySelectorAll('bdi')].map(b => b.getClientRects()[0].left)"
            )
            assert query < key
            button.dispatch_event("focus")
            words = ["from", *(part for part in said if part != "→"), "descent"]
            in_order(seen.page.locator("#ra-readout"), words)
            met |= set(said)
    assert {SHOWN[1], SHOWN[2], SHOWN[4], SHOWN[5]} <= met
    for cell in seen.page.locator("section:has(> h2:text('Top heads')) td:last-child").all():
        text = cell.text_content()
        in_order(cell, [*parts_of(text), text.rpartition(": ")[2]])


@pytest.mark.every_model
def test_predictions_and_facts_keep_their_order(
    ra: RACache, see: Callable[[Path], Seen], tmp_path: Path
) -> None:
    likely = Predictions(
        tuple((token, 0.1 + i / 100) for i, token in enumerate(TOKENS[:5])), 0.2, 3
    )
    ra.info = replace(ra.info, target_is_top_prediction=True)
    heading = Table((f"p(“{label(TOKENS[1])}”) 1", "b"), ((f"“{label(TOKENS[1])}” (0.25)", "b"),))
    section = Section("s", (f"“{label(TOKENS[2])}”, 7 of {label(TOKENS[1])}.",), heading)
    path = write_report(
        ra, tmp_path / "r.html", patched=[PatchedPrompt(-30.0, likely, likely)], sections=[section]
    )
    page = see(path).page
    for cell in page.locator(".beside td:last-child").all():
        if "·" in cell.text_content():
            wanted = [p for i, text in enumerate(SHOWN[:5]) for p in (f"“{text}”", f"{10 + i}.0 %")]
            in_order(cell, wanted)
    in_order(page.locator(".facts td", has_text="top prediction"), [SHOWN[1], "(the model’s"[:10]])
    last = page.locator("section", has=page.locator("h2:text-is('s')"))
    in_order(last.locator("p"), ["“", SHOWN[2], "”,", "7", "of", SHOWN[1], "."])
    in_order(last.locator("th").first, ["p(“", SHOWN[1], "”)", "1"])
    in_order(last.locator("td").first, ["“", SHOWN[1], "”", "(0.25)"])


@pytest.mark.every_model
def test_a_cell_of_other_text_has_the_direction_of_its_own(
    ra: RACache, see: Callable[[Path], Seen], tmp_path: Path
) -> None:
    section = Section("s", table=Table(("", ""), (("שלום עולם.", "a \u2068b"),)))
    page = see(write_report(ra, tmp_path / "r.html", sections=[section])).page
    last = page.locator("section", has=page.locator("h2:text-is('s')"))
    in_order(last.locator("td").first, ["."])
    places = last.locator("td").first.evaluate(PLACES, ["שלום", "."])
    assert places[1][1] <= places[0][0]  # a Hebrew sentence ends on the left


# ---- paths --------------------------------------------------------------------------------------


@pytest.mark.every_model
def test_paths_read_from_left_to_right(
    trace: TraceResult, see: Callable[[Path], Seen], tmp_path: Path
) -> None:
    page = see(trace.save_html(tmp_path / "p.html")).page
    page.add_style_tag(content=".split { grid-template-columns: 4fr 60rem !important }")
    in_order(page.locator(".about"), ["to “", SHOWN[5], "” (", "position 5 of 8"])
    for i, beam in enumerate(trace.beams):
        button = page.locator(".beams button span").nth(i)
        in_order(button, [f"Path {i + 1}", *parts_of(trace.paths_text[i].partition(" (score")[0])])
        button.click()
        for line, step in zip(page.locator(".detail p").all()[1:], beam.steps, strict=True):
            in_order(line, [f"Path {i + 1}", *parts_of(step_text(trace, step)), "weight"])
    for node in page.locator(".node").all():
        node.dispatch_event("click")
        name = page.locator(".detail p").first.text_content()
        assert name.removeprefix("Token ") in SHOWN
        in_order(page.locator(".detail p").first, ["Token", name.removeprefix("Token ")])
    cut = page.locator(".node", has_text="…").first.locator("text").first
    letter, dots = cut.evaluate(PLACES, ["עולם", "…"])
    assert dots[1] <= letter[0]  # what was cut is the end, on the left


# ---- figures ------------------------------------------------------------------------------------


@pytest.mark.every_model
def test_figures_keep_tokens_apart(
    ra: RACache, trace: TraceResult, see: Callable[[Path], Seen], tmp_path: Path
) -> None:
    cells = [(2, 1), (5, 2), (4, 1)]
    for i, (query, key) in enumerate(cells):
        ra["ra", 2][0, 1, query, key] = 7.0 + i
    pull = [[{"curveNumber": i, "pointNumber": 12}] for i in range(len(cells))]
    steps = [[{"curveNumber": 0, "pointNumber": i}] for i in range(2)]
    figures: list[tuple[Any, list[Any]]] = [
        (query_key_pull(ra, (2, 1), k=3), pull),
        (head_map(ra, (2, 1)), [{"xval": key, "yval": query} for query, key in cells]),
        (path_diagram(trace, n_paths=1), steps),
    ]
    drawn = (*(figure for figure, _ in figures), token_row(ra, (2, 1), query=5))
    section = Section("figures", figures=(("", drawn),))
    page = see(write_report(ra, tmp_path / "r.html", sections=[section])).page
    page.wait_for_selector(".plot:nth-child(1) .main-svg")
    for i, (_, places) in enumerate(figures):
        plot = page.locator(".js-plotly-plot").nth(i)
        met: list[str] = []
        for where in places:
            plot.evaluate("(plot, where) => Plotly.Fx.hover(plot, where)", where)
            page.wait_for_timeout(80)  # plotly answers so often
            shown = plot.locator(".hoverlayer .hovertext text.nums")
            for line in shown.locator("tspan.line").all() or [shown]:
                if "(" in line.text_content():
                    met += parts_of(line.text_content())
                    in_order(line, parts_of(line.text_content()))
        assert set(met) >= {SHOWN[5], "(5)"}
    in_order(page.locator(".gtitle"), ["in the row of", SHOWN[5], "(5)"])


def test_labels_of_figures_are_isolated_one_by_one(ra: RACache) -> None:
    ra["ra", 2][0, 1, 2, 1] = -9.0
    strongest = query_key_pull(ra, (2, 1)).data[-1]
    assert strongest.name == "\u2068·مرحبا\u2069 (2) → \u2068שלום\u2069 (1)"
    ticks = head_maps(ra, [(2, 1)]).layout.xaxis.ticktext
    assert ticks == tuple(label(t, 14).replace("<s>", "&lt;s&gt;") for t in TOKENS)
    assert distinct(["א", "a"]) == ["\u2068א\u2069 (0)", "a (1)"]


@pytest.mark.parametrize(
    ("text", "turns"),
    [("שלום", True), (" ع", True), ("٣", True), ("ߊ", True), ("a-ב", True),
     ("abc", False), ("·4", False), ("中文🙂", False), ("⟨D7⟩", False), ("", False)],
)  # fmt: skip
def test_only_what_can_turn_its_neighbours_is_isolated(text: str, turns: bool) -> None:
    assert isolated(text) == (f"\u2068{text}\u2069" if turns else text)


# ---- text ---------------------------------------------------------------------------------------


LaidOut = Callable[[Sequence[str]], list[Any]]


@pytest.fixture
def laid_out(see: Callable[[Path], Seen], tmp_path: Path) -> LaidOut:
    """Elements, each with one line of text, as a terminal that knows right-to-left shows it."""

    def get(lines: Sequence[str]) -> list[Any]:
        body = "".join(f"<pre>{escape(line)}</pre>" for line in lines)
        path = tmp_path / "lines.html"
        path.write_text(f'<meta charset="utf-8"><body dir="ltr">{body}', encoding="utf-8")
        return see(path).page.locator("pre").all()

    return get


def printed(ra: RACache, width: int) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False, markup=False)
    for part in show._map(head_of_example(ra, (2, 1)), width):
        console.print(part)
    return out.getvalue().splitlines()


@pytest.mark.every_model
def test_tables_in_a_terminal_keep_their_columns(ra: RACache, laid_out: LaidOut) -> None:
    lines = printed(ra, 140)
    cells = [line for line in lines if "→" in line]
    assert len(cells) == 10
    for line, element in zip(cells, laid_out(cells), strict=True):
        in_order(element, [*parts_of(line), "more" if "more" in line else "less"])
    (header,) = [line for line in lines if line.lstrip().startswith("<s>")]
    rows = [line for line in lines if re.match(r" +[0-7] ", line)]
    shown = [re.sub("[\u2068\u2069]", "", name) for name in header.split()]
    assert len(shown) == len(rows) == len(TOKENS)
    top, *below = laid_out([header, *rows])
    in_order(top, shown)
    for i, element in enumerate(below):
        in_order(element, [f"{i} ", label(TOKENS[i], 14).strip("\u2068\u2069")])


@pytest.mark.parametrize("width", [50, 60, 80])
def test_a_narrow_terminal_cuts_no_isolate_in_two(ra: RACache, width: int) -> None:
    ra.info = replace(ra.info, str_tokens=(tuple(chr(0x5D0 + i) * 30 for i in range(8)),))
    lines = printed(ra, width)
    assert sum("\u2068" in line for line in lines) >= 10
    for line in lines:
        whole = re.findall("\u2068[^\u2068\u2069]*\u2069", line)
        assert len(whole) == line.count("\u2068") == line.count("\u2069")


@pytest.mark.every_model
def test_what_is_said_in_a_line_keeps_its_order(
    ra: RACache, trace: TraceResult, laid_out: LaidOut
) -> None:
    ra.info = replace(ra.info, targets=("אב", "גד", "הו"))
    lines = {line: parts_of(line) for line in str(trace).splitlines()[1:]}
    lines[repr(ra).splitlines()[-1]] = ["'אב'", ", ", "'גד'", ", ", "'הו'"]
    for line, element in zip(lines, laid_out(list(lines)), strict=True):
        in_order(element, lines[line])


@pytest.mark.every_model
def test_messages_keep_words_in_order(
    folder: Callable[..., Path], laid_out: LaidOut, tmp_path: Path
) -> None:
    for file in folder("gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = ["<end>", "<?>", "אב", "גד", "הו"]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<?>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<end>", eos_token="<end>", unk_token="<?>"
    ).save_pretrained(str(tmp_path))
    model = load_folder(tmp_path, kind=KINDS[0], device="cpu")
    with pytest.raises(BadInput, match="must be one token; found 2") as refused:
        run_with_ra(model, "אב", target=logit_diff("גד הו", "אב"))
    run = call("run", "-m", str(tmp_path), "-p", "אב זח טי גד", "-t", "הו")
    assert run.exit_code == 0
    lines = {
        str(refused.value): ["found 2", "גד", "+", "הו", "Choose"],
        run.stderr.strip(): ["does not know", "זח", ",", "טי", "its tokenizer"],
    }
    for line in run.stdout.splitlines():
        if "→" in line:
            lines[line] = re.findall("[א-ת]{2}|→|<[a-z?]+>", line)
    assert len(lines) > 5
    for line, element in zip(lines, laid_out(list(lines)), strict=True):
        in_order(element, lines[line])
