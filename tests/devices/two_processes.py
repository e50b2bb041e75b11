"""Two processes of four devices each: every function on arrays that no process holds whole."""

import contextlib
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import P
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from nodes import with_factors
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from devices import launch, meshes
from jaxlora.formats import Names, diffusion, peft, safetensors

SPEC = P("data", "model")
CONFIG = jaxlora.LoRAConfig(rank=3, alpha=6)
X = np.ones((2, 16), np.float32)


def weights():
    """Return the plain weights, on the host."""
    return {"dense": np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)}


def model(params, x):
    return x @ params["dense"]


def trained(params):
    """Return adapted weights with a ``b`` that is not zero, on the same devices."""
    node = params["dense"]
    b = np.random.default_rng(1).standard_normal(node.b.shape).astype(np.float32)
    known = isinstance(node.b.sharding, NamedSharding)
    b = spread(b, node.b.sharding) if known else jax.numpy.asarray(b)
    return {"dense": with_factors(node, b=b)}


def spread(array, sharding):
    """Return a global array, of which each process makes its own part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def adapted(base):
    return trained(jaxlora.init(jax.random.key(0), model, base, X, config=CONFIG))


def whole(array):
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@pytest.fixture(scope="module")
def folder():
    yield launch.join()
    multihost_utils.sync_global_devices("done")
    jax.distributed.shutdown()


@pytest.fixture(scope="module", params=meshes.KINDS)
def base(request, folder):
    sharding = NamedSharding(meshes.make(request.param), SPEC)
    return {name: spread(weight, sharding) for name, weight in weights().items()}


@pytest.fixture(scope="module")
def params(base):
    return adapted(base)


@pytest.fixture(scope="module")
def expected(folder):
    """Return what each process computes for itself, on one device."""
    return adapted(weights())["dense"]


def assert_placed(adapters):
    assert meshes.is_placed(adapters["dense"].a, "data", None)
    assert meshes.is_placed(adapters["dense"].b, None, "model")


def test_init_draws_the_same_values(params, expected):
    assert not params["dense"].a.is_fully_addressable
    assert_placed(params)
    assert_array_equal(whole(params["dense"].a), expected.a)


def test_merge_and_unmerge_give_the_same_values(params, expected):
    merged = jaxlora.merge(params)
    assert meshes.is_placed(merged["dense"], *SPEC)
    assert_allclose(whole(merged["dense"]), jaxlora.merge({"dense": expected})["dense"], atol=1e-6)
    base, adapters = jaxlora.split(params)
    back = jaxlora.unmerge(merged, adapters)
    assert_allclose(whole(back["dense"]), whole(base["dense"]), atol=1e-5)


def test_split_knows_the_weights_again(params, expected):
    _, adapters = jaxlora.split(params)
    _, wanted = jaxlora.split({"dense": expected})
    assert adapters["dense"].fingerprint.digest == wanted["dense"].fingerprint.digest


@pytest.mark.parametrize("is_set", [False, True], ids=["", "set"])
def test_adapters_are_saved_and_loaded(is_set, params, folder):
    mesh = params["dense"].a.sharding.mesh
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        base, adapters = jaxlora.split(params)
        for _ in range(2):  # the second takes the place of the first
            jaxlora.save_adapters(folder / "adapters", adapters)
            assert [p.name for p in folder.glob("*adapters*")] == ["adapters"]
        loaded = jaxlora.load_adapters(folder / "adapters", base=base)
    assert_placed(loaded)
    assert_array_equal(whole(loaded["dense"].a), whole(adapters["dense"].a))
    assert_array_equal(whole(loaded["dense"].b), whole(adapters["dense"].b))


def test_adapters_of_one_device_load_on_all(base, folder, expected):
    loaded = jaxlora.load_adapters(folder / "from_one_device", base=base)
    assert_placed(loaded)
    assert_array_equal(whole(loaded["dense"].a), expected.a)


def test_adapters_that_every_process_has_for_itself_are_saved(folder, expected):
    base, adapters = jaxlora.split({"dense": expected})
    jaxlora.save_adapters(folder / "local", adapters)
    loaded = jaxlora.load_adapters(folder / "local", base=base)
    jax.tree.map(assert_array_equal, loaded, adapters)


def test_merged_weights_are_saved(params, folder):
    jaxlora.save_merged(folder / "merged", params)
    merged = jaxlora.merge(params)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "merged", merged)
    assert_array_equal(whole(restored["dense"]), whole(merged["dense"]))


def test_files_of_other_libraries_are_whole(params, base, folder):
    names, sites = Names(("dense", "dense")), jaxlora.find_sites(model, base, X)
    _, adapters = jaxlora.split(params)
    for _ in range(2):  # the second takes the place of the first
        peft.save(folder / "peft", adapters, names=names)
        diffusion.save(folder / "it.safetensors", adapters, names=names, style="kohya")
        safetensors.save(folder / "weights", params, names, sites=sites)
    for loaded in (
        peft.load(folder / "peft", sites=sites, names=names),
        diffusion.load(folder / "it.safetensors", sites=sites, names=names),
    ):
        assert_array_equal(loaded["dense"].a, whole(adapters["dense"].a))
        assert_array_equal(loaded["dense"].b, whole(adapters["dense"].b))
    merged = safetensors.load(folder / "weights", names, base, sites=sites)
    assert meshes.is_placed(merged["dense"], *SPEC)
    assert_array_equal(whole(merged["dense"]), whole(jaxlora.merge(params)["dense"]))


def test_another_base_is_refused_by_all(params, folder):
    base, adapters = jaxlora.split(params)
    jaxlora.save_adapters(folder / "other", adapters)
    other = jax.jit(lambda base: jax.tree.map(lambda w: w + 1, base))(base)
    with pytest.raises(ValueError, match="another base"):
        jaxlora.load_adapters(folder / "other", base=other)


def test_factors_and_bases_that_differ_are_refused_by_all(folder, expected):
    base, adapters = jaxlora.split({"dense": expected})
    jaxlora.save_adapters(folder / "own", adapters)
    is_first = jax.process_index() == 0
    for wrong, message in ((np.nan, "must be finite"), (1.0, "is not what was to be saved")):
        drifted = jax.tree.map(lambda x, by=wrong: x + (0 if is_first else by), adapters)
        with pytest.raises(ValueError, match=message):
            jaxlora.save_adapters(folder / "own", drifted)
    other = jax.tree.map(lambda w: w if is_first else w + 1, base)
    with pytest.raises(ValueError, match="another base"):
        jaxlora.load_adapters(folder / "own", base=other)
    loaded = jaxlora.load_adapters(folder / "own", base=base)
    jax.tree.map(assert_array_equal, loaded, adapters)


def test_error_of_one_is_raised_by_all(params, folder):
    base, adapters = jaxlora.split(params)
    (folder / "thesis").mkdir(exist_ok=True)
    (folder / "thesis" / "chapter.txt").write_text("words")
    multihost_utils.sync_global_devices("written")
    with pytest.raises(FileExistsError, match="holds something that is no checkpoint"):
        jaxlora.save_adapters(folder / "thesis", adapters)
    mine = folder / ("thesis" if jax.process_index() else "adapters")  # whole for the first alone
    with pytest.raises(ValueError, match="it is no Orbax checkpoint"):
        jaxlora.load_adapters(mine, base=base)


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_save_leaves_the_earlier_one(step, params, folder, monkeypatch):
    base, adapters = jaxlora.split(params)
    path = folder / "interrupted"
    jaxlora.save_adapters(path, adapters)
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == step:
            raise OSError("the power is gone")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        twice = jax.jit(lambda adapters: jax.tree.map(lambda x: 2 * x, adapters))(adapters)
        with pytest.raises((OSError, RuntimeError), match="the power is gone"):
            jaxlora.save_adapters(path, twice)
    assert (len(calls) > 0) == (jax.process_index() == 0)
    loaded = jaxlora.load_adapters(path, base=base)
    assert_array_equal(whole(loaded["dense"].b), whole(adapters["dense"].b))
    multihost_utils.sync_global_devices("loaded")
    if jax.process_index() == 0:
        for left in folder.glob("*interrupted*"):
            shutil.rmtree(left)
