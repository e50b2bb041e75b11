"""What an adapted weight is, where its arrays are, and how the leaves of a tree are named."""

from jaxlora.weights.adapters import Replacement
from jaxlora.weights.fingerprints import Base, Fingerprint
from jaxlora.weights.nodes import TrainedLeaf
from jaxlora.weights.quantized import Code, QuantizedWeight
from jaxlora.weights.roles import Roles
from jaxlora.weights.sampling import Sample

__all__ = [
    "Base",
    "Code",
    "Fingerprint",
    "QuantizedWeight",
    "Replacement",
    "Roles",
    "Sample",
    "TrainedLeaf",
]
