"""Large numbers in few digits."""

from types import MappingProxyType

_SIZES = MappingProxyType({"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3})


def prefixed(number: float, form: str, prefixes: str = "TGMk") -> str | None:
    """Return a number with the letter of a power of a thousand, None where it is below them all.

    >>> prefixed(7e9, ".3g"), prefixed(39_968_000, ".2f", "GM"), prefixed(12, ".3g")
    ('7 G', '39.97 M', None)
    """
    prefix = next((each for each in prefixes if number >= _SIZES[each]), None)
    return None if prefix is None else f"{number / _SIZES[prefix]:{form}} {prefix}"
