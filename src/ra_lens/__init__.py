"""Reversed Attention for TransformerLens: what the backward pass wanted each head to do.

Names are imported when first used, so `import ra_lens` (and `ra-lens --help`) stays fast and loads
neither torch nor plotly, pandas or typer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ra_lens.cache import RACache
    from ra_lens.check import check_model
    from ra_lens.experiments import perturbation_test
    from ra_lens.heads import rank_heads
    from ra_lens.hooks import get_ra_caching_hooks
    from ra_lens.knockouts import knockout_hooks
    from ra_lens.model import load_model
    from ra_lens.model.loading import load_demo_model
    from ra_lens.patching import patch_hooks
    from ra_lens.paths import trace_paths
    from ra_lens.run import run_with_ra
    from ra_lens.scales import best_scale
    from ra_lens.tasks import load_task

_HOMES = {
    "RACache": "ra_lens.cache",
    "best_scale": "ra_lens.scales",
    "check_model": "ra_lens.check",
    "get_ra_caching_hooks": "ra_lens.hooks",
    "knockout_hooks": "ra_lens.knockouts",
    "load_demo_model": "ra_lens.model.loading",
    "load_model": "ra_lens.model",
    "load_task": "ra_lens.tasks",
    "patch_hooks": "ra_lens.patching",
    "perturbation_test": "ra_lens.experiments",
    "rank_heads": "ra_lens.heads",
    "run_with_ra": "ra_lens.run",
    "trace_paths": "ra_lens.paths",
}

__all__ = [
    "RACache",
    "best_scale",
    "check_model",
    "get_ra_caching_hooks",
    "knockout_hooks",
    "load_demo_model",
    "load_model",
    "load_task",
    "patch_hooks",
    "perturbation_test",
    "rank_heads",
    "run_with_ra",
    "trace_paths",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module the first time it is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ra_lens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
