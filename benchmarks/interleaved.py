"""Time several steps in one process, interleaved, and compare them round by round.

Machines are noisy, and what else runs on them comes and goes; so in every round each step runs
once, in an order that changes, and only ratios of the same round are compared.
"""

import statistics
from collections.abc import Mapping
from typing import Protocol


class Step(Protocol):
    """Something that is timed."""

    def run(self) -> float:
        """Run once and return the seconds it took."""
        ...


def measure(steps: Mapping[str, Step], rounds: int, warmup: int) -> dict[str, dict[str, float]]:
    """Return for each step its median time, and its median ratio to "floor" and to "full".

    Args:
        steps: the steps by name, "floor" and "full" among them.
        rounds: how often each is measured.
        warmup: how often each runs before.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(warmup + rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds = steps[name].run()
            if i >= warmup:
                times[name].append(seconds)

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))

    return {
        name: {
            "step_ms": 1e3 * statistics.median(times[name]),
            "over_floor": ratio(name, "floor"),
            "over_full": ratio(name, "full"),
        }
        for name in names
    }
