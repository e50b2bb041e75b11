"""``merge``: plain weights from folders, against NumPy and what PEFT computes."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import programs_of_files
import pytest
from command_line import GOLDEN, PARAMS, adapters, dense, equal, hub, refused, saved, told, written
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import jaxlora

pytestmark = pytest.mark.once
TENSORS = "adapter_model.safetensors"


def restored(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def test_merge_adds_the_products_to_an_orbax_checkpoint(tmp_path):
    found = adapters()
    base, run_ = written(tmp_path / "base", PARAMS), saved(tmp_path / "run", found)
    report = told("merge", base, run_, tmp_path / "out")
    assert (report["merged"], report["weights"]) == (2, 3)
    merged = restored(tmp_path / "out")
    up, head = merged["encoder"]["up"], merged["head"]["kernel"]
    own = PARAMS["encoder"]["up"]
    assert_allclose(up["kernel"], own["kernel"] + dense(found["encoder/up/kernel"]), rtol=1e-5)
    assert_allclose(head, PARAMS["head"]["kernel"] + dense(found["head/kernel"]), rtol=1e-5)
    assert_array_equal(up["bias"], own["bias"])
    equal(merged, jax.tree.map(np.asarray, jaxlora.merge(jaxlora.bind(PARAMS, found))))
    assert "are for another base" in refused("merge", tmp_path / "out", run_, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_merge_keeps_dtypes_and_whatever_else_a_checkpoint_has(tmp_path):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    found = jaxlora.split(jaxlora.bind(half, adapters(), check_base=False))[1]
    tree = half | {"step": 7, "wide": np.ones(2), "empty": {}, "many": [jnp.ones(1), jnp.ones(2)]}
    base = written(tmp_path / "base", tree)
    told("merge", base, saved(tmp_path / "run", found), tmp_path / "out")
    merged = restored(tmp_path / "out")
    head = np.asarray(half["head"]["kernel"]).astype(np.float64) + dense(found["head/kernel"])
    assert merged["head"]["kernel"].dtype == jnp.bfloat16
    assert_allclose(np.asarray(merged["head"]["kernel"], np.float64), head, rtol=2**-8)
    assert merged["wide"].dtype == np.float64
    assert (merged["step"], merged["empty"], len(merged["many"])) == (7, {}, 2)


def test_merge_of_a_state_of_nnx(tmp_path):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    graph, state = nnx.split(Layer(nnx.Rngs(0)))
    config = jaxlora.LoRAConfig(rank=2)
    x = jnp.ones((2, 6))

    def call(state, x):
        return nnx.merge(graph, state)(x)

    tree = jaxlora.init(jax.random.key(0), call, state, x, config=config)
    found = jax.tree.map(lambda leaf: leaf + 0.1, jaxlora.split(tree)[1])
    base = written(tmp_path / "base", state)
    told("merge", base, saved(tmp_path / "run", found), tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        merged = checkpointer.restore(tmp_path / "out", state)
    wanted = jaxlora.lora(call)(jaxlora.bind(state, found), x)
    assert_allclose(call(merged, x), wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_of_peft_into_a_checkpoint_of_hugging_face(dtype, tmp_path):
    before = hub(tmp_path / "base", dtype)
    report = told("merge", tmp_path / "base", GOLDEN / "stabilized", tmp_path / "out")
    assert (report["merged"], report["weights"]) == (6, len(before))
    after = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(GOLDEN / "stabilized" / TENSORS)
    config = json.loads((GOLDEN / "stabilized" / "adapter_config.json").read_text())
    scaling = np.float32(config["lora_alpha"] / np.sqrt(config["r"]))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wanted = before[name]
        if f"{key}A.weight" in factors:
            product = factors[f"{key}B.weight"] @ factors[f"{key}A.weight"]
            wanted = (wanted.astype(np.float32) + scaling * product).astype(dtype)
        unit = 2e-6 if dtype is np.float32 else 2**-8
        assert tensor.dtype == wanted.dtype
        wide = wanted.astype(np.float64)
        assert_allclose(tensor.astype(np.float64), wide, rtol=unit, atol=unit / 100)
        assert (tensor != before[name]).any() == (f"{key}A.weight" in factors)


@pytest.mark.parametrize("name", ["lora", "magnitudes", "embedding", "saved_head", "patterns"])
def test_merged_checkpoint_computes_what_peft_does(name, tmp_path):
    hub(tmp_path / "base", np.float32)
    told("merge", tmp_path / "base", GOLDEN / name, tmp_path / "out")
    program = programs_of_files.layers()
    sites = jaxlora.find_sites(program.fn, program.params, program.x)
    like = jax.tree.map(jnp.asarray, program.params)
    params = jaxlora.formats.safetensors.load(tmp_path / "out", program.names, like, sites=sites)
    wanted = np.load(GOLDEN / name / "output.npy")
    assert_allclose(program.fn(params, program.x), wanted, rtol=1e-5, atol=1e-5)


def test_merge_of_weights_that_lie_as_those_of_gpt2(tmp_path):
    weight = np.random.default_rng(0).standard_normal((6, 4), np.float32)  # (in, out)
    (tmp_path / "base").mkdir()
    save_file({"c.weight": weight}, tmp_path / "base/model.safetensors")
    a, b = np.ones((2, 6), np.float32), np.full((4, 2), 0.5, np.float32)
    prefix = "base_model.model.c.lora_"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c"]}
    for is_transposed in (True, False):
        folder = tmp_path / f"adapter_{is_transposed}"
        folder.mkdir()
        save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, folder / TENSORS)
        about = json.dumps(config | {"fan_in_fan_out": is_transposed})
        (folder / "adapter_config.json").write_text(about)
    told("merge", tmp_path / "base", tmp_path / "adapter_True", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")["c.weight"]
    assert_allclose(merged, weight + 2 * (b @ a).T, rtol=1e-6)
    said = refused("merge", tmp_path / "base", tmp_path / "adapter_False", tmp_path / "no")
    assert "'c.weight'" in said
    assert "must have the shape (4, 6)" in said


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    run_ = saved(tmp_path / "run", adapters())
    base = written(tmp_path / "base", PARAMS)
    hub(tmp_path / "hub", np.float32)
    out = tmp_path / "out"
    assert "got one of Hugging Face and a folder of jaxlora" in refused(
        "merge", tmp_path / "hub", run_, out
    )
    assert "got one of Orbax and a folder of PEFT" in refused("merge", base, GOLDEN / "lora", out)
    assert "no weights at" in refused("merge", tmp_path, run_, out)
    for folder in (run_, GOLDEN / "lora"):
        assert "no such directory" in refused("merge", tmp_path / "nowhere", folder, out)
    assert "has no tensor for the adapter of" in refused(
        "merge", tmp_path / "hub", GOLDEN / "split_heads", out
    )
    (tmp_path / "hub/model.safetensors").write_bytes(b"no tensors")
    assert "no whole file of safetensors" in refused(
        "merge", tmp_path / "hub", GOLDEN / "lora", out
    )
    (tmp_path / "base/manifest.ocdbt").write_bytes(b"broken")
    assert "are damaged" in refused("merge", base, run_, out)
    assert not out.exists()


def test_merge_never_replaces_what_is_something_else(tmp_path):
    run_, base = saved(tmp_path / "run", adapters()), written(tmp_path / "base", PARAMS)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    assert "no checkpoint" in refused("merge", base, run_, tmp_path / "notes")
    assert "holds adapters" in refused("merge", base, run_, run_)
    hub(tmp_path / "hub", np.float32)
    for folder in (tmp_path / "hub", tmp_path / "hub/model.safetensors"):
        said = refused("merge", folder, GOLDEN / "lora", tmp_path / "hub")
        assert "must be another folder than that of the base" in said
    said = refused("merge", tmp_path / "hub", GOLDEN / "lora", tmp_path / "notes")
    assert "todo.txt, which would be lost" in said
    assert [x.name for x in (tmp_path / "notes").iterdir()] == ["todo.txt"]
    assert {x.name for x in tmp_path.iterdir()} == {"run", "base", "notes", "hub"}
