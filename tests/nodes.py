"""Nodes with other factors."""

import dataclasses


def with_factors(node, **fields):
    """Return a node of one term with other fields of the term."""
    return dataclasses.replace(node, terms=(dataclasses.replace(node.term, **fields),))
