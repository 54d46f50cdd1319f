"""The papers' recipes, one file per model, to be compared with the methods sections."""

from __future__ import annotations

from collections.abc import Mapping

from bids_dgmseg.errors import InputError
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.recipes import attunet25d, dcnnet, deepqsmseg

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "dcnnet": dcnnet.RECIPES,
    "attunet25d": attunet25d.RECIPES,
    "deepqsmseg": deepqsmseg.RECIPES,
}
"""Model → variant → recipe; the variant ``paper`` is the system itself."""


def get_recipe(model: str, variant: str = "paper") -> Recipe:
    """Return a recipe.

    Raises
    ------
    InputError
        If the model has no recipe or no such variant.
    """
    if model not in RECIPES:
        raise InputError(f"{model}: no training recipe; choose from {', '.join(RECIPES)}")
    if variant not in RECIPES[model]:
        raise InputError(f"--variant {variant}: unknown variant of {model}; choose from {', '.join(RECIPES[model])}")
    return RECIPES[model][variant]
