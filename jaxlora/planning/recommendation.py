"""Where to start: rank, alpha, targets and learning rate, each with its reason and source."""

import dataclasses
import math
from typing import Any, Literal

from jaxlora.messages import checks, table
from jaxlora.planning.numbers import prefixed
from jaxlora.planning.rules import RULES, Rules
from jaxlora.targets.config import LoRAConfig

Task = Literal["simple", "medium", "complex"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value, why it is that, and who says so.

    Attributes:
        value: the value.
        reason: why, in words.
        source: a paper, or that it is practice.
    """

    value: Any
    reason: str
    source: str


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Choices to start from; ``str`` is a table of them.

    Attributes:
        rank: rank of the factors.
        alpha: strength.
        targets: what to adapt.
        learning_rate: for an optimizer of the kind of Adam.
        capacity: the least rank whose factors hold the data, with whether that of ``rank`` do; None
            where the tokens of the data are not known.
    """

    rank: Choice
    alpha: Choice
    targets: Choice
    learning_rate: Choice
    capacity: Choice

    def config(self) -> LoRAConfig:
        """Return the config of the recommended rank, alpha and targets."""
        return LoRAConfig(rank=self.rank.value, alpha=self.alpha.value, targets=self.targets.value)

    def __str__(self) -> str:
        rows = []
        for field in dataclasses.fields(self):
            choice = getattr(self, field.name)
            value = "unknown" if choice.value is None else f"{choice.value}"
            rows.append((field.name.replace("_", " "), value, choice.reason))
        body = table.render(("choice", "value", "reason"), rows)
        sources = [
            f"{f.name.replace('_', ' ')}: {getattr(self, f.name).source}"
            for f in dataclasses.fields(self)
        ]
        return "\n".join([body, "", "sources", *sources])

    __repr__ = __str__


def recommend(
    *,
    parameters: float,
    tokens: float | None = None,
    examples: int | None = None,
    task: Task = "medium",
    rules: Rules = RULES,
) -> Recommendation:
    """Recommend rank, alpha, targets and learning rate from facts of the model and the data.

    The rank is that of a table of tasks and sizes of models, for few examples less and for many
    more. It is not raised where the data exceed what the factors can hold: that is said, with the
    rank that would hold them. Every linear layer is adapted before the rank is raised.

    Args:
        parameters: of the model, as ``7e9``.
        tokens: of the data, once through.
        examples: of the data. One of the two is needed.
        task: how far from what the model can do: ``"simple"``, as a format or a style,
            ``"medium"``, as following instructions in a field, or ``"complex"``, as new knowledge.
        rules: the numbers to go by.

    Returns:
        The choices; ``print`` shows them, and ``.config()`` is a `jaxlora.LoRAConfig`.

    Raises:
        ValueError: neither tokens nor examples are given, a number is not positive, or there is no
            such task.
        TypeError: what is to be a number is none, or rules are no `Rules`.

    >>> import jaxlora
    >>> found = jaxlora.planning.recommend(parameters=7e9, examples=500, tokens=200_000)
    >>> found.rank.value, found.learning_rate.value, found.capacity.value
    (8, 0.0002, 1)
    >>> found.config().targets
    'all-linear'
    """
    if not isinstance(rules, Rules):
        raise TypeError(f"rules must be a jaxlora.planning.Rules: got {checks.shown(rules)}")
    size = checks.check_number(parameters, "parameters", "finite and at least 1")
    checks.check_choice(task, "task", tuple(rules.ranks))
    if tokens is None and examples is None:
        raise ValueError("tokens or examples of the data must be given: got neither")
    if tokens is not None:
        tokens = checks.check_number(tokens, "tokens", "finite and at least 1")
    if examples is not None:
        examples = checks.check_count(examples, "examples")
    rank = _rank(size, examples, task, rules)
    return Recommendation(
        rank,
        _alpha(rules),
        _targets(rules),
        _learning_rate(size, rules),
        _capacity(size, tokens, rank.value, rules),
    )


def _rank(parameters: float, examples: int | None, task: str, rules: Rules) -> Choice:
    column = rules.column(parameters)
    rank = rules.ranks[task][column]
    reason = (
        f"{rank} for a {task} task and a model of {rules.sizes[column] / 1e9:g} billion parameters"
    )
    if examples is None:
        reason += "; the number of examples is not known"
    elif examples < rules.few_examples:
        rank = max(1, rank // rules.rank_step)
        reason += f", over {rules.rank_step} for fewer than {rules.few_examples:,} examples"
    elif examples > rules.many_examples:
        rank *= rules.rank_step
        reason += f", times {rules.rank_step} for more than {rules.many_examples:,} examples"
    return Choice(rank, reason, rules.sources["ranks"])


def _alpha(rules: Rules) -> Choice:
    reason = "the same for every rank: with the scaling alpha / rank one learning rate fits all"
    return Choice(rules.alpha, reason, rules.sources["alpha"])


def _targets(rules: Rules) -> Choice:
    reason = "all linear layers before more rank: attention alone learns less at equal parameters"
    if rules.targets != Rules.targets:
        reason = "as the rules say"
    return Choice(rules.targets, reason, rules.sources["targets"])


def _learning_rate(parameters: float, rules: Rules) -> Choice:
    full = rules.full_rates[rules.column(parameters)]
    rate = float(f"{rules.rate_ratio * full:.4g}")
    reason = f"about {rules.rate_ratio:g} times the {full:g} of full fine-tuning"
    return Choice(rate, reason, rules.sources["learning_rate"])


def _capacity(parameters: float, tokens: float | None, rank: int, rules: Rules) -> Choice:
    """Return the least rank that holds the data, and whether one holds them."""
    source = rules.sources["capacity"]
    if tokens is None:
        return Choice(None, "the tokens of the data are not known", source)
    bits = tokens * rules.bits_per_token
    each = rules.per_rank(parameters) * rules.bits_per_parameter
    needed = max(1, math.ceil(bits / each))
    held = f"factors of rank {rank} hold about {_short(rank * each)}bit"
    said = f"{held}, and the data have about {_short(bits)}bit"
    if needed <= rank:
        return Choice(needed, f"{said}: rank {needed} would do", source)
    return Choice(needed, f"{said}, which is more: rank {needed:,} would hold them", source)


def _short(number: float) -> str:
    """Return a number with a letter for thousands, before a unit."""
    return prefixed(number, ".3g") or f"{number:.3g} "
