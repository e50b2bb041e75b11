"""How programs are evaluated."""

import dataclasses
from typing import Literal

Form = Literal["auto", "factored", "weight-side"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How programs are evaluated.

    Attributes:
        strict: raise where a weight would be materialized.
        form: form of the products, see `jaxlora.tracing.products.forms`.
        observes: products tell of their inputs and have no low-rank term, see
            `jaxlora.tracing.transform.observe`.
        platform: the platform that is compiled for, None where that is not known yet.
        is_rematerialized: the program is computed again in the backward pass.
        is_linear: the program is a derivative, to be transposed, and so nothing in it is named.
    """

    strict: bool = False
    form: Form = "auto"
    observes: bool = False
    platform: str | None = None
    is_rematerialized: bool = False
    is_linear: bool = False
