"""What a user can ask of adapted weights: how they are used, and how much of them is trained."""

from jaxlora.reports.counts import Row, Summary
from jaxlora.reports.usage import Report
from jaxlora.tracing.jaxprs.cost import Cost
from jaxlora.tracing.recorder import Kind, Use

__all__ = ["Cost", "Kind", "Report", "Row", "Summary", "Use"]
