"""Folders that PEFT wrote, without PEFT: what they compute, and what is refused."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import programs_of_files
import pytest
from folders import CONFIG, GOLDEN, PREFIX, TENSORS, equal, load, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import Names, peft


@pytest.mark.parametrize("name", programs_of_files.CASES)
@pytest.mark.filterwarnings("ignore:.*has also the weight that")
def test_a_folder_computes_what_it_does_in_peft_and_is_written_as_it_was(name, tmp_path):
    program = programs_of_files.CASES[name].program()
    adapters = load(GOLDEN / name, program)
    wanted = np.load(GOLDEN / name / "output.npy")
    params = jaxlora.bind(program.params, adapters)
    got = jaxlora.lora(program.fn)(params, program.x)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    merged = program.fn(jaxlora.merge(params), program.x)
    assert_allclose(merged, wanted, rtol=1e-5, atol=2e-5 * np.abs(wanted).max())

    peft.save(tmp_path / "ours", adapters, names=program.names, sites=sites(program))
    equal(load(tmp_path / "ours", program), adapters)
    theirs, ours = (load_file(x / TENSORS) for x in (GOLDEN / name, tmp_path / "ours"))
    weights = {key for key in theirs if key.endswith("base_layer.weight")}
    assert theirs.keys() - weights == ours.keys()
    for key, tensor in ours.items():
        if "trainable_tokens" not in key:  # its rows are sorted
            assert_array_equal(tensor, theirs[key])


@pytest.fixture
def folder(tmp_path):
    def make(name="lora", *, config=None, tensors=None, drop=(), rename=None):
        target = tmp_path / "folder"
        shutil.copytree(GOLDEN / name, target, dirs_exist_ok=True)
        about = json.loads((target / CONFIG).read_text()) | (config or {})
        (target / CONFIG).write_text(json.dumps(about))
        arrays = load_file(target / TENSORS) | {PREFIX + k: v for k, v in (tensors or {}).items()}
        for old, new in (rename or {}).items():
            arrays[PREFIX + new] = arrays.pop(PREFIX + old)
        for key in drop:
            del arrays[PREFIX + key]
        save_file(arrays, target / TENSORS)
        return target

    return make


UP = "layers.0.up.lora_A.weight"
ONE = np.ones((2, 8), np.float32)
REFUSED = {
    "another kind": ({"config": {"peft_type": "IA3"}}, "peft_type among .*'LORA'.*: got 'IA3'"),
    "tensors of another kind": (
        {"config": {"peft_type": "LOHA"}},
        r"must have tensors of LoHa .*, as the peft_type 'LOHA' says: got .*, of LoRA",
    ),
    "aLoRA": (
        {"config": {"alora_invocation_tokens": [1]}},
        "sets alora_invocation_tokens, which this library does not have",
    ),
    "a key of tomorrow": ({"config": {"use_xlora": True}}, "sets use_xlora, which is not known"),
    "PiSSA": ({"config": {"init_lora_weights": "pissa"}}, "path_initial_model_for_weight_conv"),
    "no rank": ({"config": {"r": 0}}, "r of .* must be an int above 0: got 0"),
    "no expression": (
        {"config": {"target_modules": "(up"}},
        r"has '\(up', which is no regular expression",
    ),
    "another rank": ({"config": {"r": 3}}, r"rank of 'layers.0.down' must be 3, .*: got 2"),
    "a strange tensor": ({"tensors": {"layers.0.up.lora_C.weight": ONE}}, "are not understood"),
    "a strange prefix": (
        {"rename": {UP: "../../up.lora_A.weight"}},
        r"has 'base_model.model.*up.lora_[AB].weight', and no tensor [AB] beside it",
    ),
    "a tensor of the base": (
        {"tensors": {"layers.0.norm.weight": ONE}},
        "its config names it in no target, no module to save and no bias",
    ),
    "an unknown module": (
        {"tensors": {"layers.3.up.lora_A.weight": ONE, "layers.3.up.lora_B.weight": ONE}},
        r"'layers.3.up.lora_A.weight'|has no place: no name of the tree is 'layers.3.up'",
    ),
    "no B": (
        {"drop": ["layers.1.down.lora_B.weight"]},
        "'base_model.model.layers.1.down.lora_A.weight', and no tensor B beside it",
    ),
    "no pair": (
        {"drop": ["layers.1.down.lora_A.weight", "layers.1.down.lora_B.weight"]},
        "no factors of modules that its config names: 'layers.1.down'",
    ),
    "a target without tensors": (
        {"config": {"target_modules": ["up", "down", "gate"]}},
        "no factors for the target 'gate'",
    ),
    "not a target": (
        {"config": {"target_modules": ["up"]}},
        "factors of modules that its config does not name: 'layers.0.down'",
    ),
    "another shape": (
        {"tensors": {UP: np.ones((2, 9), np.float32)}},
        r"must have the shape \(2, 8\) for 'up\[0:1, :, :\]' as a module .*: got \(2, 9\)",
    ),
    "one axis": ({"tensors": {UP: np.ones(16, np.float32)}}, r"must have the shape .*got \(16,\)"),
    "empty": ({"tensors": {UP: np.ones((0, 8), np.float32)}}, r"is empty: got the shape \(0, 8\)"),
    "no magnitudes": (
        {"config": {"use_dora": True}},
        "got True, and .* has none for 'layers.0.down'",
    ),
    "a magnitude too many": (
        {"name": "magnitudes", "config": {"use_dora": False}},
        "got False, and .* has one for 'layers.0.down'",
    ),
    "one magnitude short": (
        {
            "name": "magnitudes",
            "tensors": {"layers.0.up.lora_magnitude_vector": np.ones(3, np.float32)},
        },
        "must have 12 elements",
    ),
    "a bias of B": ({"config": {"lora_bias": True}}, "sets lora_bias.*: B has a bias"),
    "experts short": (
        {"name": "experts", "config": {"target_parameters": ["experts.up"]}},
        "must have a pair of factors for each of .*: got 2",
    ),
    "tokens without indices": (
        {"name": "tokens", "config": {"trainable_token_indices": {"head": [1]}}},
        "has no rows of 'head', which its config names",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_or_misread_is_refused(what, folder):
    changes, message = REFUSED[what]
    name = changes.get("name", "lora")
    with pytest.raises(ValueError, match=message):
        load(folder(**changes), programs_of_files.CASES[name].program())


def test_what_is_missing_is_named(tmp_path, folder):
    program = programs_of_files.layers()
    with pytest.raises(FileNotFoundError, match=r"no file .*adapter_config.json.*PEFT saved"):
        load(tmp_path, program)
    found = folder()
    (found / TENSORS).rename(found / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"is a pickle, which can run any code"):
        load(found, program)
    (found / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*adapter_model.safetensors"):
        load(found, program)


def test_adapters_that_change_nothing_are_loaded_with_a_warning(folder):
    program = programs_of_files.layers()
    zeros = {f"layers.{i}.up.lora_B.weight": np.zeros((12, 2), np.float32) for i in range(3)}
    zeros |= {f"layers.{i}.down.lora_B.weight": np.zeros((8, 2), np.float32) for i in range(3)}
    with pytest.warns(UserWarning, match="change nothing: all their products are 0"):
        load(folder(tensors=zeros), program)


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("", "linear"),
        ("0.18.1", "linear"),
        ("0.18.1", "transposed"),
        ("0.19.0", "linear"),
        ("0.21.2", "linear"),
    ],
)
def test_square_experts_lie_as_the_version_that_wrote_them_says(version, layout, folder):
    experts, size, rank = 3, 6, 2
    names = Names(("experts.w", "w", layout))
    a, b = programs_of_files.drawn(rank * experts, size), programs_of_files.drawn(size, 2 * experts)
    program = programs_of_files.Program(
        lambda params, x: jnp.einsum("eio,ni->eno", params["w"], x),
        {"w": programs_of_files.drawn(experts, size, size)},
        programs_of_files.drawn(5, size),
        names,
    )
    made = folder(
        config={
            **{"peft_version": version or None, "target_modules": []},
            **{"target_parameters": ["experts.w"], "r": rank, "lora_alpha": rank},
        }
    )
    save_file(
        {PREFIX + "experts.lora_A.weight": a, PREFIX + "experts.lora_B.weight": b}, made / TENSORS
    )
    adapters = load(made, program)
    by_expert = np.einsum(
        "eri,ore->eio", a.reshape(experts, rank, size), b.reshape(size, rank, experts)
    )  # A on the axis before B's
    is_on_in = version >= "0.20" or (layout == "transposed" and version < "0.19")
    wanted = by_expert if is_on_in else by_expert.swapaxes(1, 2)
    assert_allclose(adapters["w"].delta(program.params["w"]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bits_are_read(dtype, folder):
    program = programs_of_files.layers()
    tensor = np.arange(16).reshape(2, 8).astype(dtype)
    path = folder(tensors={UP: tensor}, drop=())
    a = load(path, program)["up[0:1, :, :]"].a  # an adapter of its own, for it has its own dtype
    assert a.dtype == dtype
    assert_array_equal(a[0].T.astype(jnp.float32), tensor.astype(np.float32))


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_damaged_files_are_refused_by_name(data, tmp_path_factory):
    program, target = programs_of_files.layers(), tmp_path_factory.mktemp("damaged") / "folder"
    shutil.copytree(GOLDEN / "lora", target)
    path = target / data.draw(st.sampled_from([CONFIG, TENSORS]))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "claim", "noise", "header"]))
    at = data.draw(st.integers(0, len(content) - 1))
    match kind:
        case "cut":
            content = content[:at]
        case "claim":  # a header, or a value, of terabytes
            content[:8] = (1 << 43).to_bytes(8, "little")
        case "noise":
            content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
        case "header":
            content = bytearray(content.replace(b"[2,8]", b"[2,9]", 1))
    path.write_bytes(content)
    error = ""
    try:
        load(target, program)
    except ValueError as raised:
        error = str(raised)
    assert not error or str(path) in error or f"{target}/adapter_" in error
