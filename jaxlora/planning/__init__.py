"""What a training run will cost, before it starts, and what to start it with.

Everything here is known from shapes: no weights are made, and nothing is computed.
"""

from jaxlora.planning.costs import Plan, Step
from jaxlora.planning.counting import count
from jaxlora.planning.planner import plan
from jaxlora.planning.recommendation import Choice, Recommendation, recommend
from jaxlora.planning.rules import RULES, Rules

__all__ = [
    "RULES",
    "Choice",
    "Plan",
    "Recommendation",
    "Rules",
    "Step",
    "count",
    "plan",
    "recommend",
]
