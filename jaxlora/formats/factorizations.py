"""Products in other forms than two factors, each as the two factors that it is exactly.

The two are as LoRA's tensors: ``A`` is ``(rank, in, *window)`` and ``B`` is ``(out, rank, *ones)``,
the window being that of a convolution. What is computed is float32, or wider for wider.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

Shape = tuple[int, ...]
Tensors = Mapping[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of a product.

    Attributes:
        name: what it is called.
        shapes: returns the shape of each of its tensors, by what the tensor is, from the shapes
            of ``A`` and ``B`` of a LoRA of the same rank.
        pair: returns ``A`` and ``B``, their axes of in and window perhaps as one.
    """

    name: str
    shapes: Callable[[Shape, Shape], dict[str, Shape]]
    pair: Callable[[Tensors], Pair]

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """What its tensors are."""
        return frozenset(self.shapes((1, 1), (1, 1)))

    def rank(self, shapes: Mapping[str, Shape]) -> int:
        """Return the rank of tensors of some shapes, 0 where they have none."""
        first = shapes["w1_b" if "w1_b" in shapes else "A"]
        return first[0] if first else 0


def form_of(kinds: Iterable[str]) -> Form | None:
    """Return the form that has just these tensors, None where there is none."""
    return _BY_KINDS.get(frozenset(kinds))


def missing(kinds: Iterable[str]) -> frozenset[str] | None:
    """Return what lacks beside some tensors for a form to be whole, None where no form has all."""
    forms = [form.kinds for form in _FORMS if form.kinds >= {*kinds}]
    return min(forms, key=len) - {*kinds} if forms else None


def _plain(own: Tensors) -> Pair:
    return own["A"], own["B"]


def _with_core(own: Tensors) -> Pair:
    """Return the factors of LoCon: ``A`` of a single element, and the window between the two."""
    return _windowed(own["core"], own["A"]), wide(own["B"])


def _with_latent(own: Tensors) -> Pair:
    """Return the factors of LoRA-XS: a matrix that is trained between two that are not."""
    return np.tensordot(wide(own["latent"]), wide(own["A"]), 1), wide(own["B"])


def _with_values(own: Tensors) -> Pair:
    """Return the factors of AdaLoRA: singular values between vectors."""
    return wide(own["A"]) * wide(own["E"]), wide(own["B"])


def _elementwise(own: Tensors) -> Pair:
    """Return the factors of LoHa: the product of elements of two products of rank r has rank r²."""
    one, two, first, second = (wide(own[kind]) for kind in ("w1_b", "w2_b", "w1_a", "w2_a"))
    a = np.einsum("in,jn->ijn", one, two).reshape(-1, one.shape[1])
    return a, np.einsum("oi,oj->oij", first, second).reshape(len(first), -1)


def _elementwise_with_cores(own: Tensors) -> Pair:
    """Return the factors of LoHa of convolutions, with a window in each of its products."""
    made = {}
    for x in "12":
        down = _windowed(own[f"t{x}"], own[f"w{x}_b"])
        made[f"w{x}_b"] = down.reshape(len(down), -1)
        made[f"w{x}_a"] = own[f"w{x}_a"].T
    return _elementwise(made)


def _windowed(core: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Return ``(rank, in, *window)`` of a window between ranks and a factor of one element."""
    return np.einsum("sr...,ri->si...", wide(core), wide(down).reshape(down.shape[:2]))


def wide(array: np.ndarray) -> np.ndarray:
    """Return an array as float32, or as it is if it is wider."""
    return array.astype(np.promote_types(array.dtype, np.float32))


def _point(first: Shape) -> Shape:
    """Return the shape of ``A`` for a window of one element."""
    return (*first[:2], *(1 for _ in first[2:]))


def _flat(first: Shape) -> Shape:
    return first[0], math.prod(first[1:])


def _core(first: Shape) -> Shape:
    return (first[0], first[0], *first[2:])


# From: LoRA (Hu et al. 2021, arXiv:2106.09685); LoCon and LoHa (Yeh et al. 2023, arXiv:2309.14859,
# and Hyeon-Woo et al. 2021, arXiv:2108.06098); LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604);
# AdaLoRA (Zhang et al. 2023, arXiv:2303.10512).
_FORMS = (
    Form("LoRA", lambda a, b: {"A": a, "B": b}, _plain),
    Form("LoCon", lambda a, b: {"A": _point(a), "core": _core(a), "B": b}, _with_core),
    Form("LoRA-XS", lambda a, b: {"A": a, "latent": (a[0], a[0]), "B": b}, _with_latent),
    Form("AdaLoRA", lambda a, b: {"A": _flat(a), "E": (a[0], 1), "B": b[:2]}, _with_values),
    Form(
        "LoHa",
        lambda a, b: {"w1_a": b[:2], "w1_b": _flat(a), "w2_a": b[:2], "w2_b": _flat(a)},
        _elementwise,
    ),
    Form(
        "LoHa with windows",
        lambda a, b: {
            **{"t1": _core(a), "w1_a": (a[0], b[0]), "w1_b": a[:2]},
            **{"t2": _core(a), "w2_a": (a[0], b[0]), "w2_b": a[:2]},
        },
        _elementwise_with_cores,
    ),
)
_BY_KINDS = MappingProxyType({form.kinds: form for form in _FORMS})
