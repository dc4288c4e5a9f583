"""`GATES` maps a config's `gate` to its recipe, `INFERENCE` what a Gumbel-Sparsemax gate may do at test time."""

from models.recipes.base import Recipe
from models.recipes.evidence import Evidence
from models.recipes.open import Open
from models.recipes.routed import Routed
from models.recipes.trained import Global, GumbelSoftmax, GumbelSparsemax, TrainedGate
from utils.config import Component

GATES: dict[str, type[Recipe]] = {
    "gumbel_sparsemax": GumbelSparsemax,
    "sparsemax": TrainedGate,
    "gumbel_softmax": GumbelSoftmax,
    "evidence": Evidence,
    "none": Open,
}

INFERENCE: dict[str, type[Component]] = {"global": Global, "routed": Routed}
