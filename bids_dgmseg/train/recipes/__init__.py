"""The papers' recipes, one file a model, to be ticked off against the methods sections."""

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
    """Look a recipe up.

    Raises
    ------
    InputError
        If the model has none, or none of this name.
    """
    if model not in RECIPES:
        raise InputError(f"{model}: has no recipe to train by; choose from {', '.join(RECIPES)}")
    if variant not in RECIPES[model]:
        raise InputError(f"--variant {variant}: {model} has {', '.join(RECIPES[model])}; choose one of them")
    return RECIPES[model][variant]
