"""Recipes of SparseML 1.x and of its fork CAP, read into the modifiers of prunus.

In this order: `document` finds the modifiers of a file and fills in its variables (`equations`),
`reading` has a converter for each of them and puts the results together.
"""

from prunus.recipe.sparseml.document import front_matter, is_sparseml, refuse_newer
from prunus.recipe.sparseml.parts import DIALECTS, Note
from prunus.recipe.sparseml.reading import Reading, log_notes, read

__all__ = [
    "DIALECTS",
    "Note",
    "Reading",
    "front_matter",
    "is_sparseml",
    "log_notes",
    "read",
    "refuse_newer",
]
