"""What adapters have learned: singular values, subspaces, and what a change of weights needs.

Functions take adapters by path, as of `jaxlora.split`, or a tree with adapted weights. They compute
from the factors what they can, in float32, and form no dense product for it. What they return is
looked up by path, and prints as a table.
"""

from jaxlora.analysis import plot
from jaxlora.analysis.amplifying import Amplification, Norms, amplification
from jaxlora.analysis.approximation import Approximations, Explained, explained
from jaxlora.analysis.findings import Findings
from jaxlora.analysis.intrusion import Intruders, Intrusion, intruders, without_intruders
from jaxlora.analysis.spectra import Spectra, Spectrum, spectrum
from jaxlora.analysis.subspaces import Similarity, similarity

__all__ = [
    "Amplification",
    "Approximations",
    "Explained",
    "Findings",
    "Intruders",
    "Intrusion",
    "Norms",
    "Similarity",
    "Spectra",
    "Spectrum",
    "amplification",
    "explained",
    "intruders",
    "plot",
    "similarity",
    "spectrum",
    "without_intruders",
]
