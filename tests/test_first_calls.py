"""What the first call of a function compiles, which costs a user more than the call itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora.formats import Names, diffusion, peft

NAMES = Names(("m.{w}", "{w}"))
ENTRIES = 23  # of an axis, as in no other test: what another has compiled is not compiled again


def program(outs):
    """Return a function of several weights, these, and an input."""
    params = {f"w{out}": np.ones((ENTRIES, out), np.float32) for out in outs}
    return lambda params, x: [x @ w for w in params.values()], params, np.ones((2, ENTRIES))


@pytest.fixture
def compiles(caplog):
    """Return the names of the programs that a call compiles."""

    def names(call, *args, **kwargs):
        caplog.clear()
        with jax.log_compiles():
            call(*args, **kwargs)
        return re.findall(r"Compiling jit\((\S+)\) with global", caplog.text)

    assert names(jax.jit(lambda x: x - 29), np.ones((ENTRIES, 5))) == ["<lambda>"]
    return names


def adapted(outs, key):
    fn, params, x = program(outs)
    config = jaxlora.LoRAConfig(rank=2)
    tree = jaxlora.init(key, fn, params, x.astype(np.float32), config=config)
    return jaxlora.split(tree)[1], jaxlora.find_sites(fn, params, x.astype(np.float32))


def test_weights_of_equal_inputs_share_the_program_that_draws(compiles, key):
    fn, params, x = program((31, 37, 41, 43))
    config = jaxlora.LoRAConfig(rank=3)
    found = compiles(jaxlora.init, key, fn, params, x.astype(np.float32), config=config)
    assert found.count("_draw") == 1


def test_a_fingerprint_is_one_program(compiles, key):
    fn, params, x = program((47,))
    params = jax.tree.map(jnp.asarray, params)
    config = jaxlora.LoRAConfig(rank=3)
    tree = jaxlora.init(key, fn, params, x.astype(np.float32), config=config)
    assert compiles(jaxlora.split, tree) == ["_sample"]


@pytest.mark.parametrize(("files", "outs"), [(peft, (53, 59)), (diffusion, (61, 67))])
def test_reading_a_file_compiles_nothing(files, outs, compiles, tmp_path, key):
    adapters, sites = adapted(outs, key)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    files.save(tmp_path / "file.safetensors", moved, names=NAMES)
    assert compiles(files.load, tmp_path / "file.safetensors", sites=sites, names=NAMES) == []
