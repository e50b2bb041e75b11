"""The user's choices: how large, how strong, and where. What they choose is in `selection`."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.initializers import FromWeight, LoftQ
from jaxlora.initializers.registry import NAMED, Initializer, InitializerName
from jaxlora.messages import checks
from jaxlora.weights import blocks
from jaxlora.weights.adapters import scaling

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how.

    Attributes:
        rank: number of columns of ``a`` and rows of ``b``, at least 1.
        alpha: strength; the product ``a b`` is scaled by alpha / rank. Finite and positive.
        rank_stabilized: scale it by alpha / √rank instead (rsLoRA, Kalajdzievski 2023,
            arXiv:2312.03732), which is an alpha of alpha · √rank, and kept so in the adapters.
        targets: ``"all-linear"`` (every matmul and convolution weight whose smaller side is at
            least the rank and that is looked up nowhere; `jaxlora.init` warns of those it leaves
            out), one regular expression (`re.fullmatch` on the path), or a sequence of names, each
            a run of whole path parts, with slices behind it for a part of the weight:
            ``"qkv/kernel[:, 0:64]"``. ``"all-linear"`` may be among the names. A weight that no
            low-rank rule covers is adapted if a name ends at it, as ``"gate/kernel"``, or a target
            matches nothing else, and runs dense (see `jaxlora.targets.Sites`).
        exclude: as targets, but whole weights alone, and wins over them.
        layers: adapt these layers alone, by index from 0: those with such a number in their path
            (the first that ends a part of it, as in ``block_3``), or, of a weight with no number
            in its path, such entries along its first stack axis, as `nn.scan` stacks layers.
        rank_pattern: other ranks by name, or by regular expression for whole paths.
        alpha_pattern: other alphas, likewise.
        stack: axes of these weights, by name as in the patterns, along which they are a stack, each
            entry with factors of its own, where the program does not tell or tells otherwise, as
            experts that are all multiplied at once: ``{"experts": (0,)}``. The factors are low-rank
            in every program, and ``()`` is one weight in all.
        initializer: how ``a`` starts: ``"uniform"`` (±1/√in), ``"normal"``, ``"kaiming"``,
            ``"orthogonal"``, or a function ``(key, (in, rank), dtype) -> array``. Or ``"zero_a"``,
            with ``b`` drawn and ``a`` zero. Or how both factors start from the weight, and change
            the base: ``"pissa"``, ``"milora"``, ``"olora"``, or a
            `jaxlora.initializers.FromWeight`, also with data; or of a weight that is quantized and
            what it was, `jaxlora.initializers.loftq`.
        train: also train these leaves whole: names or one regular expression, as targets; norms,
            biases, a new head. They keep their dtype, and the base keeps what they were.
        rows: also train rows of these leaves, by name as in the patterns: indices along the first
            axis, as the tokens that are new in an embedding. Each call then makes a copy of it.
        bias: also train biases, the leaves whose name is ``bias`` or ``b``: ``"all"``,
            ``"lora_only"`` for those beside adapted weights, or ``"none"``.
        magnitude: also train the norm of each column of the weight (DoRA, Liu et al. 2024,
            arXiv:2402.09353), in float32 or wider; of whole weights, or of parts that have all of
            their in axes.
        dtype: floating dtype of the factors.

    Raises:
        ValueError: rank below 1, alpha not finite and positive, no targets, a bad regular
            expression, no or negative layers, an unknown initializer or a dtype that is not
            floating.
        TypeError: a rank or layer is not an int, targets are not strings, a pattern is no mapping,
            a flag no bool.

    >>> import jaxlora
    >>> jaxlora.LoRAConfig(rank=8, alpha=16, targets=("query", "value")).scaling
    2.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Targets = ALL_LINEAR
    exclude: Targets = ()
    layers: Sequence[int] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    rank_stabilized: bool = False
    stack: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, hash=False)
    initializer: InitializerName | Initializer | FromWeight | LoftQ = "uniform"
    train: Targets = ()
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict, hash=False)
    bias: Literal["none", "all", "lora_only"] = "none"
    magnitude: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checks.check_count(self.rank, "rank"))
        _checked_alpha(self.alpha, "alpha")
        for field in ("targets", "exclude", "train"):
            object.__setattr__(self, field, _checked(getattr(self, field), field))
        if not self.targets:
            raise ValueError(f"targets must name something to adapt: got {self.targets!r}")
        for field in ("rank_stabilized", "magnitude"):
            checks.check_flag(getattr(self, field), field)
        checks.check_choice(self.bias, "bias", ("none", "all", "lora_only"))
        _check_initializer(self.initializer)
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_indices(self.layers, "layers"))
        for field, check in _PATTERNS:
            object.__setattr__(self, field, _checked_pattern(getattr(self, field), field, check))
        checks.check_dtype(self.dtype, "dtype of the factors")

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product, alpha / rank, or alpha / √rank if stabilized."""
        return scaling(self.plain_alpha(self.alpha, self.rank), self.rank)

    def plain_alpha(self, alpha: float, rank: int) -> float:
        """Return the alpha of a plain LoRA with the scaling of this kind."""
        return alpha * math.sqrt(rank) if self.rank_stabilized else float(alpha)


def _check_initializer(initializer: object) -> None:
    if checks.is_function(initializer) or isinstance(initializer, FromWeight | LoftQ):
        return
    if not isinstance(initializer, str):
        raise TypeError(
            f"initializer must be a function or one of {sorted(NAMED)}: "
            f"got {checks.shown(initializer)}"
        )
    if initializer in ("eva", "corda", "lora_ga", "loftq"):
        raise ValueError(
            f"{initializer!r} starts from data: give the initializer that has it, from "
            f"jaxlora.initializers.{initializer}"
        )
    if initializer not in NAMED:
        raise ValueError(
            f"initializer must be a function or one of {sorted(NAMED)}: got {initializer!r}"
        )


def _checked_alpha(alpha: object, field: str) -> float:
    return checks.check_number(alpha, field, "finite and positive")


def _checked_indices(indices: object, field: str) -> tuple[int, ...]:
    """Return indices in increasing order, or raise for what is none."""
    indices = _listed(indices, f"{field} must be indices")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, numbers.Integral):
            raise TypeError(f"{field} must be indices: got {checks.shown(index)}")
    if not indices or min(indices) < 0:
        raise ValueError(f"{field} must be indices from 0, at least one: got {indices}")
    return tuple(sorted({int(index) for index in indices}))


def _checked_axes(axes: object, field: str) -> tuple[int, ...]:
    """Return axes in increasing order, perhaps none, or raise for what is none."""
    axes = _listed(axes, f"{field} must be indices")
    return _checked_indices(axes, field) if axes else ()


def _listed(values: Any, needed: str) -> tuple[Any, ...]:
    """Return several values as a tuple, or raise for what is one, a mapping or nothing."""
    if not checks.is_listing(values):
        raise TypeError(f"{needed}: got {checks.shown(values)}")
    return tuple(values)


def _checked_pattern(
    pattern: object, field: str, check: Callable[[Any, str], Any]
) -> dict[str, Any]:
    """Return a copy of a pattern, or raise for a key or a value that is none."""
    if not isinstance(pattern, Mapping):
        raise TypeError(f"{field} must be a mapping from names: got {checks.shown(pattern)}")
    checked = {}
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise TypeError(f"the names in {field} must be strings: got {checks.shown(key)}")
        if not blocks.is_part(key):
            _checked(key, field)
        checked[key] = check(value, f"{field}[{key!r}]")
    return checked


def _checked(targets: Targets, field: str) -> Targets:
    """Return targets in a hashable form, or raise for what is no target."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"{field} is no regular expression: {error}: got {targets!r}"
            ) from error
        return targets
    needed = f"{field} must be names, as ('query', 'value'), or one regular expression"
    targets = _listed(targets, needed)
    for name in targets:
        if not isinstance(name, str):
            raise TypeError(f"{needed}: got {checks.shown(name)} among them")
        if not name.strip("/"):
            raise ValueError(f"{field} must be runs of path parts, as 'query': got {name!r}")
        if field in ("exclude", "train") and blocks.parse(name)[1] is not None:
            raise ValueError(f"{field} must name whole weights: got {name!r}")
    return targets


_PATTERNS = (  # the fields that map names to values, and what checks a value
    ("rank_pattern", checks.check_count),
    ("alpha_pattern", _checked_alpha),
    ("rows", _checked_indices),
    ("stack", _checked_axes),
)
