"""Nodes of a tree that are no arrays: what takes them for one gets an error that says what to do.

JAX and NumPy ask an unknown object how to become an array, and take what does not answer for an
array of one Python object. The nodes answer with the function that was forgotten.
"""

from typing import ClassVar, NoReturn

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "getitem", "float", "int"),
)
_REFLECTED = _OPERATORS[: _OPERATORS.index("lt")]
_OF_ARRAYS = frozenset(
    {"T", "mT", "at", "astype", "reshape", "transpose", "ndim", "size", "itemsize", "sharding"}
    | {"aval", "weak_type", "dot", "sum", "mean", "max", "min", "conj", "real", "imag", "item"}
    | {"ravel", "flatten", "squeeze", "swapaxes", "take", "copy", "tolist", "devices", "view"}
)


class Opaque:
    """A class whose instances are refused where an array is needed.

    Attributes:
        instead: what to do with an instance, for the error.
    """

    instead: ClassVar[str]

    @property
    def __jax_array__(self) -> NoReturn:  # jax.lax asks whether there is one, and does not call it
        _refuse(self)

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        del dtype, copy
        _refuse(self)

    def __getattr__(self, name: str) -> NoReturn:
        kind = type(self).__name__
        hint = f": it is no array; {self.instead}" if name in _OF_ARRAYS else ""
        raise AttributeError(f"{kind!r} object has no attribute {name!r}{hint}")


def _refuse(node: Opaque, *others: object) -> NoReturn:
    del others
    raise TypeError(f"the {type(node).__name__} is no array: {node.instead}")


for _name in _OPERATORS:
    setattr(Opaque, f"__{_name}__", _refuse)
for _name in _REFLECTED:
    setattr(Opaque, f"__r{_name}__", _refuse)
