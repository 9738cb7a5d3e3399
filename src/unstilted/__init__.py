"""unstilted: make a chat model talk like a thoughtful person, and prove what that gained and what it cost."""

from typing import TYPE_CHECKING, Any

from unstilted.errors import UserError
from unstilted.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from unstilted.pipeline import run_pipeline, run_stage

__all__ = ["Recipe", "UserError", "load_recipe", "run_pipeline", "run_stage"]


def __getattr__(name: str) -> Any:
    """`run_pipeline` and `run_stage`, imported when asked for: the command line's help must not wait for them."""
    if name in ("run_pipeline", "run_stage"):
        from unstilted import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
