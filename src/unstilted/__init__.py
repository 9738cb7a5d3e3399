"""unstilted: make a chat model talk like a thoughtful person, and prove what that gained and what it cost."""

from unstilted.errors import UserError
from unstilted.recipe import Recipe, load_recipe

__all__ = ["Recipe", "UserError", "load_recipe"]
