"""A network of a few weights for maps of 4 mm."""

from dataclasses import replace

from bids_dgmseg.models.registry import get_model

DEFAULT = get_model("default")
SMALL_MODEL = replace(
    DEFAULT, arch={"features": [4, 8]}, weights=None, input=replace(DEFAULT.input, spacing_mm=(4.0, 4.0, 4.0))
)
