"""Tensors are made and written some rows at a time, and are those that are made at once."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.formats import Names, safetensors, streaming
from jaxlora.formats.safetensors import entries

FEW = 64  # bytes of the rows here
NHWC = ("NHWC", "HWIO", "NHWC")


def convolved(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=NHWC)


def product(spec):
    return lambda params, x: jnp.einsum(spec, x, params["w"])


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


CASES = {  # shape of the weight, program, shape of its input, pairs of names
    "linear": ((12, 20), product("bi,io->bo"), (2, 12), ("w", "w")),
    "transposed": ((12, 20), product("bi,io->bo"), (2, 12), ("w", "w", "transposed")),
    "heads": ((12, 4, 6), product("bi,ihd->bhd"), (2, 12), ("w", "w")),
    "out of heads": ((4, 6, 20), product("bhd,hdo->bo"), (2, 4, 6), ("w", "w")),
    "kernel": ((3, 2, 4, 8), convolved, (1, 4, 4, 4), ("w", "w", "conv")),
    "layers": ((5, 8, 8), scanned, (2, 8), ("{i}.w", "w[{i}]")),
    "experts": ((5, 12, 20), product("bi,eio->bo"), (2, 12), ("w", "w")),
    "a part for each": ((12, 60), product("bi,io->bo"), (2, 12), None),
    "prime": ((31, 37), product("bi,io->bo"), (2, 31), ("w", "w")),
    "few": ((2, 3), product("bi,io->bo"), (2, 2), ("w", "w")),
}
PARTS = (("q", "w[:, :20]"), ("k", "w[:, 20:40]"), ("v", "w[:, 40:]"))


def case(name, dtype="float32"):
    shape, fn, x, pair = CASES[name]
    params, x = {"w": normal(0, *shape).astype(dtype)}, normal(1, *x).astype(dtype)
    names = Names(*(PARTS if pair is None else (pair,)))
    return params, fn, x, names, jaxlora.find_sites(fn, params, x)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_tensor(name, monkeypatch):
    params, _, _, names, sites = case(name)
    monkeypatch.setattr(entries, "_ROWS", FEW)
    for entry in entries.entries(params, names, sites).values():
        rows = entry.rows(4)
        for leaf in (params["w"], np.asarray(params["w"])):
            wanted = np.ravel(entry.to_tensor(leaf))
            assert_array_equal(np.concatenate([np.ravel(r.to_tensor(leaf)) for r in rows]), wanted)
        assert (len(rows) > 1) == (name != "few")
        assert all(4 * np.prod(row.form.shape) <= max(FEW, 4 * 31) for row in rows)


def test_what_has_no_divisors_is_one_piece(monkeypatch):
    monkeypatch.setattr(entries, "_ROWS", 4096)
    params = {"w": np.ones((2, 1021), np.float32)}
    sites = jaxlora.find_sites(product("bi,io->bo"), params, np.ones((1, 2), np.float32))
    (entry,) = entries.entries(params, Names(("w", "w")), sites).values()
    assert entry.rows(4) == [entry]


def saved(folder, params, names, sites):
    safetensors.save(folder, params, names, sites=sites)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "rank", [{"rank": 2}, {"rank": 2, "magnitude": True}], ids=["lora", "dora"]
)
@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_what_is_merged_before(name, rank, tmp_path, monkeypatch):
    params, fn, x, names, sites = case(name, "bfloat16")
    config = jaxlora.LoRAConfig(**rank)
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), fn, params, x, config=config))
    params = jaxlora.bind(base, jax.tree.map(lambda leaf: leaf + 0.1, adapters))
    wanted = saved(tmp_path / "before", jaxlora.merge(params), names, sites)
    monkeypatch.setattr(entries, "_ROWS", FEW)
    assert saved(tmp_path / "it", params, names, sites) == wanted


@jax.enable_x64(True)  # in this thread alone
@pytest.mark.parametrize("name", CASES)
def test_64_bits_are_written_as_they_are(name, tmp_path, monkeypatch):
    params, _, _, names, sites = case(name, "float64")
    monkeypatch.setattr(entries, "_ROWS", FEW)
    saved(tmp_path / "it", params, names, sites)
    assert_array_equal(
        safetensors.load(tmp_path / "it", names, params, sites=sites)["w"], params["w"], strict=True
    )


def test_adapters_of_parts_are_merged_by_rows_or_at_once(tmp_path, monkeypatch):
    params, fn, x, names, sites = case("a part for each")
    config = jaxlora.LoRAConfig(rank=2, targets=("w[:, :20]", "w[:, 40:]"))
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), fn, params, x, config=config))
    params = jaxlora.bind(base, jax.tree.map(lambda leaf: leaf + 0.1, adapters))
    monkeypatch.setattr(entries, "_ROWS", FEW)
    for given in (names, Names(("w", "w")), Names(("w", "w", "transposed"))):
        wanted = saved(tmp_path / "before", jaxlora.merge(params), given, sites)
        assert saved(tmp_path / "it", params, given, sites) == wanted


@pytest.fixture
def stack():
    """Return a stack of layers with adapters, and what saves it."""
    params, x = {"w": normal(0, 8, 64, 64).astype("bfloat16")}, normal(1, 2, 64).astype("bfloat16")
    config = jaxlora.LoRAConfig(rank=2)
    base, adapters = jaxlora.split(
        jaxlora.init(jax.random.key(0), scanned, params, x, config=config)
    )
    sites = jaxlora.find_sites(scanned, params, x)

    def save(folder, change):
        tree = jaxlora.bind(base, jax.tree.map(change, adapters))
        safetensors.save(folder, tree, Names(("{i}.w", "w[{i}]")), sites=sites)

    return save


def test_no_merged_weight_is_whole_in_memory(stack, tmp_path, monkeypatch):
    before, most, append = {id(x) for x in jax.live_arrays()}, 0, streaming._File.append

    def recorded(file, name, rows):
        nonlocal most
        append(file, name, rows)
        most = max(most, *(x.size for x in jax.live_arrays() if id(x) not in before))

    monkeypatch.setattr(streaming._File, "append", recorded)
    monkeypatch.setattr(entries, "_ROWS", 2048)
    stack(tmp_path / "it", lambda leaf: leaf + 0.1)
    assert 0 < most <= 1024


def test_what_rounding_has_undone_is_told_once(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_ROWS", FEW)
    with pytest.warns(UserWarning, match=r"changed 0.00% of the elements of 'w' that its") as told:
        stack(tmp_path / "it", lambda leaf: leaf * 0 + 1e-5)
    assert len(told) == 1


def test_what_is_undone_in_a_few_layers_is_not_told(stack, tmp_path, monkeypatch):
    def change(leaf):
        return jnp.full_like(leaf, 1e-5).at[-1].set(0.1)

    monkeypatch.setattr(entries, "_ROWS", FEW)
    with warnings.catch_warnings(action="error"):
        stack(tmp_path / "it", change)


def test_what_is_not_finite_in_the_last_row_is_refused(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "_ROWS", FEW)
    with pytest.raises(ValueError, match="merged weight 'w' is not finite: a and b hold NaN"):
        stack(tmp_path / "it", lambda leaf: (leaf + 0.1).at[-1, -1, -1].set(jnp.nan))
    assert not (tmp_path / "it").exists()
