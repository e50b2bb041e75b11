"""What a user can reach: names of the root and of its namespaces, and the types they speak of."""

import ast
import dataclasses
import functools
import inspect
import pathlib
import subprocess
import sys
import types
import typing

import jax
import optax
import pytest
import typed_script
from matplotlib.axes import Axes

import jaxlora
import jaxlora.nnx
from jaxlora import analysis
from jaxlora.formats import diffusion, models, names, peft, safetensors

approx = functools.partial(pytest.approx, abs=1e-4)
pytestmark = pytest.mark.once

NAMESPACES = [
    analysis.plot,
    jaxlora,
    *(value for name in jaxlora.__all__ if inspect.ismodule(value := getattr(jaxlora, name))),
    diffusion,
    models,
    names,
    peft,
    safetensors,
]
PUBLIC = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in NAMESPACES
    for name in space.__all__
}


def test_root_lists_its_names_alone():
    assert {name for name in dir(jaxlora) if not name.startswith("__")} == {*jaxlora.__all__}
    assert sorted(jaxlora.__all__) == jaxlora.__all__


def test_namespaces_are_there_after_the_root_is_imported_and_flax_is_not():
    names = [name for name in PUBLIC if not name.startswith("jaxlora.nnx")]
    code = f"""
import sys, jaxlora
for name in {sorted(names)}:
    value = jaxlora
    for part in name.split(".")[1:]:
        value = getattr(value, part)
assert "flax" not in sys.modules
"""
    code = code.replace("'jaxlora.nnx', ", "")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moments", "no attribute 'moments': use jaxlora.calibration.moments"),
        ("to_plain", "use jaxlora.algebra.rebase"),
        ("Quantization", "use jaxlora.QuantizationConfig"),
        ("Sites", "use jaxlora.targets.Sites"),
        ("Report", "use jaxlora.reports.Report"),
        ("Roles", "use jaxlora.weights.Roles"),
        ("combine", "use jaxlora.algebra.combine"),
        ("freze", "nearest: jaxlora.freeze$"),
        ("merge_eror", "nearest: jaxlora.merge_error$"),
        ("LoraConfig", "nearest: jaxlora.LoRAConfig$"),
        ("zzz", "module 'jaxlora' has no attribute 'zzz'$"),
    ],
)
def test_name_that_is_not_there_is_told_where_it_is(name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(jaxlora, name)


LATER = {"optax": optax, "Axes": Axes}  # what is imported where it is used


def types_in(hint):
    """Yield the classes in a type."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        yield hint
    inner = typing.get_args(hint)
    for each in inner if typing.get_origin(hint) is not typing.Literal else ():
        yield from types_in(list(each) if isinstance(each, tuple) else each)
    for each in hint if isinstance(hint, list) else ():
        yield from types_in(each)


def hints_of(value):
    """Yield the types in the signature of a function, or of the fields and methods of a class."""
    if not inspect.isclass(value):
        yield from typing.get_type_hints(value, localns=LATER).values()
        return
    if dataclasses.is_dataclass(value):
        yield from typing.get_type_hints(value, localns=LATER).values()
    for name, member in inspect.getmembers(value):
        member = member.fget if isinstance(member, property) else member
        is_own = inspect.isfunction(member) and member.__module__.startswith("jaxlora")
        if is_own and (name == "__init__" or not name.startswith("_")):
            yield from typing.get_type_hints(member, localns=LATER).values()


CALLABLE = {n: x for n, x in PUBLIC.items() if inspect.isclass(x) or inspect.isfunction(x)}


@pytest.mark.parametrize("name", CALLABLE)
def test_every_type_in_a_signature_is_public(name):
    found = {kind for hint in hints_of(CALLABLE[name]) for kind in types_in(hint)}
    ours = {kind for kind in found if kind.__module__.startswith("jaxlora")}
    hidden = {kind for kind in ours if not any(kind is value for value in PUBLIC.values())}
    assert not hidden


def test_signatures_name_types_of_this_library():
    """The walk above sees types: some that must be met are."""
    seen = {
        kind for value in CALLABLE.values() for hint in hints_of(value) for kind in types_in(hint)
    }
    assert {jaxlora.LoRAConfig, jaxlora.targets.Sites, jaxlora.algebra.Method} <= seen
    assert {jaxlora.weights.Roles, jaxlora.reports.Row, jaxlora.Adapter} <= seen


def test_script_of_a_user_gets_the_values(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        summed, started = typed_script.summed(), typed_script.started()
        stored, module = typed_script.stored(tmp_path), typed_script.module()
        travelled, looked_at = typed_script.travelled(tmp_path), typed_script.looked_at()
        planned = typed_script.planned()
    assert summed == {"difference": approx(0), "energy": approx(1), "sets": 8}
    assert (started["ranks"], started["rebased"]) == (4, 4)
    assert 0 < started["loftq"] < started["quantized"] < 0.1
    assert (stored["trainable"], stored["kinds"], stored["marked"], stored["named"]) == (
        56,
        1,
        4,
        4,
    )
    assert stored["extra"] > 0
    assert (stored["back"], stored["error"]) == (approx(0), approx(0))
    assert module == {"module": approx(0)}
    assert planned == {"trained": 56, "full": 96, "sites": 56, "shapes": 56, "rank": 4}
    assert travelled == {"places": 3, "loaded": 0, "merged": 0}
    assert (looked_at["taken off"], looked_at["pictures"]) == (0, 4)
    assert 0 < looked_at["phi"] <= 1
    assert looked_at["kept"] == approx(1)


def test_script_of_a_user_calls_every_function():
    tree = ast.parse(pathlib.Path(typed_script.__file__).read_text())
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    functions = {name for name, value in CALLABLE.items() if inspect.isfunction(value)}
    assert len(functions) > 30
    assert {name.rpartition(".")[2] for name in functions} <= named
