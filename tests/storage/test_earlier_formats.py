"""The description in a checkpoint of adapters: what earlier versions wrote, and what is damaged."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.weights.roles import Roles

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent.parent / "golden"


def grid(*shape, start=0, step=1 / 32):
    """Return an array of consecutive multiples of a power of two, which are exact."""
    return (np.arange(start, start + np.prod(shape), dtype=np.float32) * step).reshape(shape)


BASE = {
    "mlp": grid(4, 3, step=1 / 8),
    "qkv": grid(4, 6, step=1 / 16),
    "norm": grid(4, 5, step=1 / 4),
    "embed": grid(5, 2, step=1),
}
FACTORS = {
    "mlp": {"a": grid(4, 2, start=1), "b": grid(2, 3, start=2)},
    "qkv[:, 2:6]": {"a": grid(4, 1, start=3), "b": grid(1, 4, start=4)},
    "norm": {"a": grid(4, 2, start=5), "b": grid(2, 5, start=6), "magnitude": grid(5, start=7)},
    "embed": {"value": grid(2, 2, start=8)},
}
ALPHAS = {"mlp": 16.0, "qkv[:, 2:6]": 2.5, "norm": 8.0}


def assert_golden(adapters):
    """Check every value and static field of the adapters that the golden checkpoints hold."""
    assert set(adapters) == set(FACTORS)
    for name, factors in FACTORS.items():
        for field, value in factors.items():
            assert_array_equal(getattr(adapters[name], field), value, strict=True)
    for name, alpha in ALPHAS.items():
        assert adapters[name].alpha == alpha
        assert adapters[name].roles == Roles((), (0,), (1,))
    assert adapters["mlp"].magnitude is adapters["qkv[:, 2:6]"].magnitude is None
    assert adapters["embed"].rows == (1, 3)


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_earlier_formats_load(version):
    path = GOLDEN / f"adapters_format_{version}"
    assert_golden(jaxlora.load_adapters(path, base=BASE))


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_restore_with_plain_orbax(version):
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(GOLDEN / f"adapters_format_{version}")
    assert set(found) == set(FACTORS)
    for name, factors in FACTORS.items():
        assert set(found[name]) == set(factors)
        for field, value in factors.items():
            assert_array_equal(found[name][field], value, strict=True)


def copied(version, folder):
    """Return a copy of a golden checkpoint, to be damaged."""
    return shutil.copytree(GOLDEN / f"adapters_format_{version}", folder / "adapters")


def edit(path, change):
    """Change the description in a checkpoint."""
    file = path / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    change(about["custom_metadata"])
    file.write_text(json.dumps(about))


def places(value, keys=()):
    """Yield the keys that lead to each value in JSON, and it."""
    if keys:
        yield keys, value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from places(inner, (*keys, key))
        else:
            yield (*keys, key), inner


def holder(about, keys):
    """Return what holds the last of some keys."""
    for key in keys[:-1]:
        about = about[key]
    return about


def other(value):
    """Return a value of the same type that is another."""
    match value:
        case str():
            return value + "x"
        case int() | float():
            return value + 1
        case None:
            return "x"
    return value[:-1] if isinstance(value, list) and value else {}


def about_of(version):
    text = (GOLDEN / f"adapters_format_{version}" / "_CHECKPOINT_METADATA").read_text()
    return json.loads(text)["custom_metadata"]


def test_description_in_which_anything_was_edited_is_refused(tmp_path):
    path = copied(2, tmp_path)
    original = (path / "_CHECKPOINT_METADATA").read_bytes()
    for keys, value in places(about_of(2)):
        for change in (
            lambda about, keys=keys, value=value: holder(about, keys).__setitem__(
                keys[-1], other(value)
            ),
            lambda about, keys=keys: holder(about, keys).pop(keys[-1]),
        ):
            edit(path, change)
            with pytest.raises(ValueError, match=r"adapters are damaged|are damaged, or have"):
                jaxlora.load_adapters(path, base=BASE)
            (path / "_CHECKPOINT_METADATA").write_bytes(original)
    assert_golden(jaxlora.load_adapters(path, base=BASE))


def set_field(name, value, index=0):
    """Return an edit of a field of the description of one adapter."""
    return lambda about: about["adapters"][index].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("alpha", 0), "alpha of 'mlp' must be finite and positive: got 0"),
        (set_field("alpha", -1.0), "alpha of 'mlp' must be finite and positive: got -1.0"),
        (set_field("alpha", float("inf")), "alpha of 'mlp' must be finite and positive: got inf"),
        (set_field("alpha", float("nan")), "alpha of 'mlp' must be finite and positive: got nan"),
        (set_field("alpha", "16"), "'alpha' of 'mlp' cannot be '16'"),
        (set_field("alpha", None), "'alpha' of 'mlp' cannot be None"),
        (set_field("alpha", True), "'alpha' of 'mlp' cannot be True"),
        (set_field("rank", 0), "rank of 'mlp' must be at least 1: got 0"),
        (set_field("rank", 2.0), "'rank' of 'mlp' cannot be 2.0"),
        (set_field("rank", 3), r"an array must be float32\[4, 3\]: got float32\[4, 2\]"),
        (set_field("roles", {"stack": [], "in": [0]}), "it has no 'out'"),
        (set_field("roles", {"stack": [], "in": [1], "out": [1]}), "roles must name every axis"),
        (set_field("roles", {"stack": [], "in": [0], "out": []}), "roles of 'mlp' must name each"),
        (set_field("roles", [0, 1]), r"'roles' cannot be \[0, 1\]"),
        (set_field("dtypes", ["float32"]), "dtypes of 'mlp' must be those of its factors"),
        (set_field("dtypes", ["float32", "f32x"]), "dtypes of 'mlp' must be names of dtypes"),
        (set_field("base", 5), "'base' of 'mlp' cannot be 5"),
        (set_field("base", {"dtype": "float32"}), "it has no 'shape' of 'mlp'"),
        (set_field("path", 5), "'path' cannot be 5"),
        (set_field("path", "norm"), "targets must be the paths of adapters, each once"),
        (set_field("changed", 1), "'changed' of 'mlp' cannot be 1"),
        (set_field("rows", [5], 3), r"rows of 'embed' must be of a leaf of shape \[5, 2\]: got"),
        (set_field("rows", 1, 3), "'rows' of 'embed' cannot be 1"),
        (lambda about: about.pop("adapters"), "it has no 'adapters'"),
        (lambda about: about.pop("checksums"), "it has no 'checksums'"),
        (lambda about: about["checksums"].pop("mlp"), "it has no 'mlp'"),
        (lambda about: about["checksums"]["mlp"].pop("a"), "it has no 'a' of 'mlp'"),
        (lambda about: about["checksums"]["mlp"].update(a=1), r"\['mlp'\] are not as they were"),
        (lambda about: about.update(targets=[]), "targets must be the paths"),
        (lambda about: about.update(format_version=2), "does not have the checksum"),
        (lambda about: about.update(format_version=None), "does not have the checksum"),
    ],
)
def test_fields_that_cannot_be_are_refused_in_format_1_too(change, message, tmp_path):
    path = copied(1, tmp_path)
    edit(path, change)
    with pytest.raises(ValueError, match=rf"are damaged: .*{message}"):
        jaxlora.load_adapters(path, base=BASE)


def test_format_1_without_any_one_field_is_refused_by_its_name(tmp_path):
    path = copied(1, tmp_path)
    original = (path / "_CHECKPOINT_METADATA").read_bytes()
    optional = {"jaxlora", "digest", "changed"}  # not used, or not known in every case
    for keys, _ in places(about_of(1)):
        if isinstance(keys[-1], str) and keys[-1] not in optional:
            edit(path, lambda about, keys=keys: holder(about, keys).pop(keys[-1]))
            with pytest.raises(ValueError, match=r"are damaged|a checkpoint of something else"):
                jaxlora.load_adapters(path, base=BASE)
            (path / "_CHECKPOINT_METADATA").write_bytes(original)


def assert_equal_or_damaged(path):
    """Check that what loads is what was saved, or that it is said to be damaged."""
    try:
        loaded = jaxlora.load_adapters(path, base=BASE)
    except ValueError as error:
        if "damaged" not in str(error):
            raise
    else:
        assert_golden(loaded)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_give_the_same_values_or_are_refused(seed, tmp_path):
    draw, path = random.Random(seed), copied(2, tmp_path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for damage in ("flip", "flip", "letter", "cut"):
            at = draw.randrange(len(content))
            new = {
                "flip": bytes([content[at] ^ 1 << draw.randrange(8)]),
                "letter": bytes([draw.randrange(32, 127)]),
                "cut": b"",
            }[damage]
            file.write_bytes(content[:at] + new + (content[at + 1 :] if new else b""))
            assert_equal_or_damaged(path)
        file.write_bytes(content)
