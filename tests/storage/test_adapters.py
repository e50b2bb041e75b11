"""Checkpoints with real Orbax: what is written, what is refused, what an interruption leaves."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases.layers_linen import linen_attention, linen_layers_scanned
from cases.layers_nnx import nnx_transformer
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.weights import Roles


@pytest.fixture
def trained(key):
    return linen_attention().trained(key)


@pytest.fixture
def saved(trained, tmp_path):
    base, adapters = jaxlora.split(trained)
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    return tmp_path / "adapters", base, adapters


def test_only_factors_are_written(saved):
    path, _, adapters = saved
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path)
    assert set(arrays) == set(adapters)
    for name, factors in arrays.items():
        assert set(factors) == {"a", "b"}
        assert_array_equal(factors["a"], adapters[name].a)


def test_what_is_needed_to_know_adapters_again_is_written(saved):
    path, base, adapters = saved
    about = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert about["jaxlora"] == jaxlora.__version__
    assert about["targets"] == list(adapters)
    (query,) = (entry for entry in about["adapters"] if "query" in entry["path"])
    assert (query["rank"], query["alpha"]) == (2, 3.0)
    assert query["roles"] == {"stack": [], "in": [0], "out": [1, 2]}
    kernel = base["params"]["query"]["kernel"]
    assert (query["base"]["shape"], query["base"]["dtype"]) == (list(kernel.shape), "float32")
    assert len(query["base"]["digest"]) == 16


@pytest.mark.parametrize("make", [linen_attention, linen_layers_scanned, nnx_transformer])
def test_merged_weights_restore_with_plain_orbax(make, key, tmp_path):
    params = make().trained(key)
    plain = jaxlora.merge(params)
    jaxlora.save_merged(tmp_path / "merged", params)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "merged", plain)
    jax.tree.map(assert_array_equal, restored, plain)
    assert jax.tree.structure(restored) == jax.tree.structure(make().params)


def test_base_with_other_values_is_refused(saved):
    path, base, _ = saved
    other = jax.tree.map(lambda x: x + 1, base)
    with pytest.raises(ValueError, match=r"another base:(.|\n)*query/kernel' holds other values"):
        jaxlora.load_adapters(path, base=other)


def test_base_of_other_shape_or_dtype_is_refused(saved):
    path, base, _ = saved
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    with pytest.raises(ValueError, match=r"must be float32\[8, 2, 4\]: got bfloat16\[8, 2, 4\]"):
        jaxlora.load_adapters(path, base=other)
    other = jax.tree.map(lambda x: x[:1], base)
    with pytest.raises(ValueError, match=r"must be float32\[8, 2, 4\]: got float32\[1, 2, 4\]"):
        jaxlora.load_adapters(path, base=other)


def test_base_without_the_path_is_refused(saved):
    path, base, _ = saved
    with pytest.raises(ValueError, match="'params/query/kernel' is missing; nearest: "):
        jaxlora.load_adapters(path, base=base["params"])


def test_adapters_split_under_jit_load_by_shape(trained, tmp_path):
    _, adapters = jax.jit(jaxlora.split)(trained)
    with pytest.warns(UserWarning, match=r"base of 'params/.* are unknown.*; pass base="):
        jaxlora.save_adapters(tmp_path / "adapters", adapters)
    base, _ = jaxlora.split(trained)
    other = jax.tree.map(lambda x: x + 1, base)
    jaxlora.load_adapters(tmp_path / "adapters", base=other)
    abstract = jax.eval_shape(lambda: base)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=abstract)
    jax.tree.map(assert_array_equal, loaded, adapters)
    jaxlora.save_adapters(tmp_path / "adapters", adapters, base=base)
    with pytest.raises(ValueError, match="holds other values"):
        jaxlora.load_adapters(tmp_path / "adapters", base=other)


def test_later_save_replaces_an_earlier_one(saved):
    path, base, adapters = saved
    twice = jax.tree.map(lambda x: 2 * x, adapters)
    jaxlora.save_adapters(path, twice)
    jax.tree.map(assert_array_equal, jaxlora.load_adapters(path, base=base), twice)
    assert [p.name for p in path.parent.iterdir()] == ["adapters"]


def test_missing_directory_is_named(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match=r"no adapters at .*nowhere: there is no such"):
        jaxlora.load_adapters(tmp_path / "nowhere", base=trained)


def test_foreign_directory_is_refused_and_left_alone(tmp_path, saved):
    _, base, adapters = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ValueError, match="it is no Orbax checkpoint"):
        jaxlora.load_adapters(tmp_path / "thesis", base=base)
    with pytest.raises(FileExistsError, match=r"holds something that is no checkpoint"):
        jaxlora.save_adapters(tmp_path / "thesis", adapters)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


def test_checkpoint_of_something_else_is_refused(tmp_path, saved, trained):
    _, base, _ = saved
    jaxlora.save_merged(tmp_path / "merged", trained)
    with pytest.raises(ValueError, match="it is a checkpoint of something else"):
        jaxlora.load_adapters(tmp_path / "merged", base=base)


def test_later_format_is_refused(saved):
    path, base, _ = saved
    file = path / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    about["custom_metadata"]["format_version"] = 99
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"have format 99.* reads up to format 2"):
        jaxlora.load_adapters(path, base=base)


def data_files(path):
    return [p for p in path.rglob("*") if p.is_file() and p.parent.name == "d"]


LOADING = """
import sys, conftest, jaxlora  # conftest: so that the base has the same bits
from cases.layers_linen import linen_attention
import jax
base, _ = jaxlora.split(linen_attention().trained(jax.random.key(0)))
jaxlora.load_adapters(sys.argv[1], base=base)
"""


@pytest.mark.parametrize("damage", ["none", "truncate", "remove", "flip"])
def test_damaged_files_are_refused(saved, damage):
    path, _, _ = saved
    for file in data_files(path):
        content, middle = file.read_bytes(), file.stat().st_size // 2
        if damage == "truncate":
            file.write_bytes(content[:middle])
        elif damage == "remove":
            file.unlink()
        elif damage == "flip":
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
    # in a process of its own, where an error of a thread that nobody can catch is seen
    command = [sys.executable, "-c", LOADING, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert (done.returncode == 0) == (damage == "none")
    assert ("are damaged" in done.stderr) == (damage != "none")
    assert "Event loop is closed" not in done.stderr


def test_values_other_than_those_saved_are_refused(saved, tmp_path):
    path, base, adapters = saved
    changed = {
        name: dataclasses.replace(adapter, b=adapter.b.at[0, 0].add(1.0))
        for name, adapter in adapters.items()
    }
    jaxlora.save_adapters(tmp_path / "changed", changed)
    shutil.copy(path / "_CHECKPOINT_METADATA", tmp_path / "changed" / "_CHECKPOINT_METADATA")
    with pytest.raises(ValueError, match="are not as they were saved"):
        jaxlora.load_adapters(tmp_path / "changed", base=base)


def test_truncated_description_is_refused(saved):
    path, base, _ = saved
    file = path / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="is damaged: _CHECKPOINT_METADATA is no JSON"):
        jaxlora.load_adapters(path, base=base)


INTERRUPTED = """
import os, pathlib, sys
import jax.numpy as jnp, jaxlora, orbax.checkpoint

path, stage = pathlib.Path(sys.argv[1]), sys.argv[2]
params = {"w": jnp.ones((4, 4))}
config = jaxlora.LoRAConfig(rank=2)
params = jaxlora.init(__import__("jax").random.key(0), lambda p, x: x @ p["w"], params,
                      jnp.ones((2, 4)), config=config)
base, adapters = jaxlora.split(params)
jaxlora.save_adapters(path, adapters)

if stage == "writing":
    orbax.checkpoint.Checkpointer.save = lambda *args, **kwargs: os._exit(9)
else:
    rename, calls = pathlib.Path.rename, []
    def dying(self, target):
        calls.append(target)
        if len(calls) == int(stage):
            os._exit(9)
        return rename(self, target)
    pathlib.Path.rename = dying
import jax
jaxlora.save_adapters(path, jax.tree.map(lambda x: x + 1, adapters))
"""


@pytest.mark.parametrize("stage", ["writing", "1", "2"])
def test_interrupted_save_leaves_the_earlier_one(stage, tmp_path, key):
    path = tmp_path / "adapters"
    died = subprocess.run([sys.executable, "-c", INTERRUPTED, str(path), stage])
    assert died.returncode == 9
    base = {"w": jnp.ones((4, 4))}
    loaded = jaxlora.load_adapters(path, base=base)
    config = jaxlora.LoRAConfig(rank=2)
    first = jaxlora.init(key, lambda p, x: x @ p["w"], base, jnp.ones((2, 4)), config=config)
    assert_array_equal(loaded["w"].a, first["w"].a)
    later = jax.tree.map(lambda x: x + 2, loaded)
    jaxlora.save_adapters(path, later)
    jax.tree.map(assert_array_equal, jaxlora.load_adapters(path, base=base), later)
    assert [p.name for p in tmp_path.iterdir()] == ["adapters"]


def test_adapters_of_64_bits_say_what_they_need(tmp_path):
    base = {"w": np.ones((4, 4), np.float32)}
    roles = Roles((), (0,), (1,))
    with jax.enable_x64(True):
        a, b = (jnp.full(shape, 1 / 3) for shape in ((4, 2), (2, 4)))
        adapters = {"w": jaxlora.Adapter(a, b, roles, alpha=2.0, shape=(4, 4))}
        jaxlora.save_adapters(tmp_path / "wide", adapters, base=base)
        loaded = jaxlora.load_adapters(tmp_path / "wide", base=base)
        jax.tree.map(assert_array_equal, loaded, adapters)
    with pytest.raises(ValueError, match=r"'w' at .*wide is float64, which needs jax_enable_x64"):
        jaxlora.load_adapters(tmp_path / "wide", base=base)


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapters is empty"):
        jaxlora.save_adapters(tmp_path / "adapters", {})
    with pytest.raises(TypeError, match="must be an Adapter: got an array"):
        jaxlora.save_adapters(tmp_path / "adapters", {"w": jnp.ones(3)})  # pyright: ignore
