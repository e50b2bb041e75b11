"""Rules for where to start a run: numbers with the reason and the source of each.

They are data. Read them as `RULES`, and change them with `dataclasses.replace`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from jaxlora.messages import checks
from jaxlora.targets.config import ALL_LINEAR, LoRAConfig, Targets

_PRACTICE = "practice: a rule of thumb of those who fine-tune, of no paper"
_REGRET = "Schulman et al. 2025, LoRA Without Regret, Thinking Machines Lab"
_TASKS = ("simple", "medium", "complex")
_POSITIVE = (
    *("alpha", "rate_ratio", "bits_per_parameter", "bits_per_token"),
    *("width_power", "width_divisor"),
)


def _ranks() -> Mapping[str, tuple[int, ...]]:
    return MappingProxyType({"simple": (8, 8, 16), "medium": (16, 16, 32), "complex": (32, 64, 64)})


def _sources() -> Mapping[str, str]:
    return MappingProxyType(
        {
            "ranks": _PRACTICE,
            "alpha": _REGRET,
            "targets": f"{_REGRET}; Dettmers et al. 2023, arXiv:2305.14314, section 4",
            "learning_rate": f"{_REGRET}; Dettmers et al. 2023, arXiv:2305.14314, appendix B",
            "capacity": f"{_REGRET}; Allen-Zhu & Li 2024, arXiv:2404.05405",
        }
    )


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers that `jaxlora.planning.recommend` goes by.

    Attributes:
        sizes: parameters of the models that the columns of the tables are for; a model takes those
            of the nearest by ratio.
        ranks: for each task the rank for a model of each size.
        few_examples: with fewer examples the rank is divided by ``rank_step``.
        many_examples: with more of them it is multiplied by it.
        rank_step: see there.
        targets: what to adapt.
        alpha: strength, for every rank: the scaling alpha / rank then asks for one learning rate.
        full_rates: learning rate of full fine-tuning with Adam for a model of each size.
        rate_ratio: the learning rate of adapters over that of full fine-tuning.
        bits_per_parameter: what one trained parameter can hold of facts.
        bits_per_token: what one token of the data tells.
        width_power: all linear layers of a decoder of N parameters have, for each rank,
            ``N ** width_power / width_divisor`` parameters of factors.
        width_divisor: see there.
        sources: where the rules for ``ranks``, ``alpha``, ``targets``, ``learning_rate`` and
            ``capacity`` come from.

    Raises:
        ValueError: a number is not positive, or a table has not a column for each size.
        TypeError: what is to be a number is none, or a table none.

    >>> import dataclasses, jaxlora
    >>> mine = dataclasses.replace(jaxlora.planning.RULES, alpha=16.0)
    >>> jaxlora.planning.recommend(parameters=7e9, examples=5000, rules=mine).alpha.value
    16.0
    """

    sizes: tuple[float, ...] = (7e9, 13e9, 70e9)
    ranks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=_ranks, hash=False)
    few_examples: int = 1_000
    many_examples: int = 10_000
    rank_step: int = 2
    targets: Targets = ALL_LINEAR
    alpha: float = 32.0
    full_rates: tuple[float, ...] = (2e-5, 2e-5, 1e-5)
    rate_ratio: float = 10.0
    bits_per_parameter: float = 2.0
    bits_per_token: float = 1.0
    width_power: float = 2 / 3
    width_divisor: float = 1.42
    sources: Mapping[str, str] = dataclasses.field(default_factory=_sources, hash=False)

    def __post_init__(self) -> None:
        for name in ("few_examples", "many_examples", "rank_step"):
            checks.check_count(getattr(self, name), name)
        for name in _POSITIVE:
            checks.check_number(getattr(self, name), name, "finite and positive")
        object.__setattr__(self, "targets", LoRAConfig(targets=self.targets).targets)
        _check_column("sizes", self.sizes, len(checks.check_numbers(self.sizes, "sizes")))
        _check_column("full_rates", self.full_rates, len(self.sizes))
        _check_keys("ranks", self.ranks, _TASKS)
        for task in _TASKS:
            _check_column(f"ranks[{task!r}]", self.ranks[task], len(self.sizes))
            for rank in self.ranks[task]:
                checks.check_count(rank, f"a rank in ranks[{task!r}]")
        _check_keys("sources", self.sources, tuple(_sources()))

    def column(self, parameters: float) -> int:
        """Return the column of the tables for a model of so many parameters."""
        ratios = [max(size / parameters, parameters / size) for size in self.sizes]
        return ratios.index(min(ratios))

    def per_rank(self, parameters: float) -> float:
        """Return the parameters of the factors of all linear layers of a decoder, for each rank."""
        return parameters**self.width_power / self.width_divisor


def _check_column(name: str, values: object, count: int) -> None:
    """Raise if these are not so many positive numbers, at least one."""
    numbers = checks.check_numbers(values, name)
    if not numbers or len(numbers) != count or min(numbers) <= 0:
        raise ValueError(
            f"{name} must be positive numbers, one for each of sizes: got {tuple(numbers)}"
        )


def _check_keys(name: str, values: object, keys: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a mapping from names: got {checks.shown(values)}")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{name} must have {keys}: {missing} are missing")


RULES = Rules()
