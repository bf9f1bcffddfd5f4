"""What every command refuses in the words it was given, before it runs.

An option whose value is empty is one whose value got lost, as that of an unset variable of the
shell; so is one whose value is another option's name.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from typer.core import TyperCommand

from ra_lens.cli.options import reported
from ra_lens.errors import BadInput

# These are read as they are: an empty prompt or target is told as such, and nothing between solved
# examples is a format.
_TEXTS = ("prompt", "target", "separator")


class Command(TyperCommand):
    """A command that reads no empty word, and no option's name, as a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, then look at the values as they were typed."""
        given = list(args)
        typed: dict[str, Any] = self.make_parser(ctx).parse_args(list(args))[0]
        rest = super().parse_args(ctx, args)
        params: Any = self.get_params(ctx)
        options = {name for param in params for name in param.opts if name.startswith("-")}
        with reported(debug=False):
            for param in params:
                values = typed.get(param.name)
                several = isinstance(values, list | tuple)
                for value in cast("list[object]", values) if several else [values]:
                    if isinstance(value, str):
                        _check(param, value, options, given)
        return rest


def _check(param: Any, value: str, options: Collection[str], given: Sequence[str]) -> None:
    name = "/".join(param.opts) if param.opts[0].startswith("-") else param.opts[0].upper()
    if not value.strip() and param.name not in _TEXTS:
        raise BadInput(f"found {name} {value!r}, which is empty. Give a value, or leave it out.")
    if value in options and not any(f"{one}={value}" in given for one in param.opts):
        raise BadInput(
            f"found {value} where the value of {name} is needed. Give one; if {value} is meant, "
            f"write {param.opts[0]}={value}."
        )
