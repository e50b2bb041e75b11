"""The table of primitives."""

import jax
import jax.numpy as jnp
import pytest
from cases import normal

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat


def equation(fn, *args):
    """Return the only equation of a function."""
    (eqn,) = compat.opened(jax.make_jaxpr(fn)(*args)).eqns
    return eqn


def test_primitive_has_one_rule():
    with pytest.raises(ValueError, match=r"\['dot_general'\] have a rule already"):
        registry.rule("dot_general", "an operation of ours")(lambda run, eqn, x: [x])
    assert registry.primitive(equation(jnp.dot, normal(0, 2, 3), normal(1, 3, 4))).rule is not None


def test_nothing_is_known_of_a_primitive_without_a_rule():
    known = registry.primitive(equation(lambda x: x**3, normal(0, 2)))
    assert known == registry.Primitive()


@pytest.mark.parametrize(
    ("fn", "shapes", "flops"),
    [
        (jnp.matmul, [(2, 3), (3, 4)], 2 * 2 * 3 * 4),
        (jnp.multiply, [(2, 3), (2, 3)], 2 * 3),
        (jnp.sum, [(2, 3)], 2 * 3),
        (jnp.transpose, [(2, 3)], 0),
        (lambda x, w: jax.lax.conv(x, w, (1,), "VALID"), [(1, 3, 8), (5, 3, 2)], 2 * 5 * 7 * 3 * 2),
    ],
)
def test_operations_of_an_equation_are_counted(fn, shapes, flops):
    eqn = equation(fn, *(normal(i, *shape) for i, shape in enumerate(shapes)))
    assert registry.primitive(eqn).flops(eqn) == flops


def test_every_product_is_heavy():
    eqn = equation(jnp.matmul, normal(0, 2, 3), normal(1, 3, 4))
    assert registry.primitive(eqn).is_product
    assert registry.primitive(eqn).is_heavy
