"""`GATES` maps a config's `gate` to its recipe."""

from models.recipes.base import Recipe
from models.recipes.evidence import Evidence
from models.recipes.open import Open
from models.recipes.trained import GumbelSoftmax, GumbelSparsemax, TrainedGate

GATES: dict[str, type[Recipe]] = {
    "gumbel_sparsemax": GumbelSparsemax,
    "sparsemax": TrainedGate,
    "gumbel_softmax": GumbelSoftmax,
    "evidence": Evidence,
    "none": Open,
}
