"""Files of adapters of diffusion models: what they compute, their names, what is refused."""

import json

import diffusion_programs as programs
import jax.numpy as jnp
import numpy as np
import pytest
from folders import GOLDEN, equal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import save_file

import jaxlora
from jaxlora.formats import Names, diffusion
from jaxlora.formats.diffusion import spellings

FILES = sorted((GOLDEN.with_name("diffusion")).glob("*.safetensors"))
NAMES, SITES = programs.NAMES, programs.SITES


def load(path, **options):
    return diffusion.load(path, sites=SITES, names=NAMES, **options)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_file_computes_what_it_does_in_what_wrote_it(path, style, tmp_path):
    adapters = load(path)
    wanted = np.load(path.with_suffix(".npy"))
    params = jaxlora.bind(programs.PARAMS, adapters)
    got = jaxlora.lora(programs.model)(params, *programs.ARGS)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    ours = tmp_path / "it.safetensors"
    diffusion.save(ours, adapters, names=NAMES, sites=SITES, style=style)
    equal(load(ours), adapters)


A, B = np.ones((2, 8), np.float32), np.ones((6, 2), np.float32)
MODULE = "text_encoder.layers.0.fc1"
WANTED = np.full((8, 6), 2.0)  # A and B multiplied
SPELLINGS = {
    "kohya": ("lora_te_layers_0_fc1.lora_down.weight", "lora_te_layers_0_fc1.lora_up.weight"),
    "kohya with two": (
        "lora_te1_layers_0_fc1.lora_down.weight",
        "lora_te1_layers_0_fc1.lora_up.weight",
    ),
    "lycoris": ("lycoris_layers_0_fc1.lora_down.weight", "lycoris_layers_0_fc1.lora_up.weight"),
    "diffusers": (f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"),
    "before": (f"{MODULE}.lora.down.weight", f"{MODULE}.lora.up.weight"),
    "text encoders before": (
        f"{MODULE}.lora_linear_layer.down.weight",
        f"{MODULE}.lora_linear_layer.up.weight",
    ),
}


@pytest.mark.parametrize("style", SPELLINGS)
@pytest.mark.parametrize("ones", [0, 2])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (0, 1), (1, 0.5), (4, 2)])
def test_spellings_and_alpha(style, ones, alpha, scale, tmp_path):
    down, up = SPELLINGS[style]
    tensors = {name: x.reshape(*x.shape, *[1] * ones) for name, x in ((down, A), (up, B))}
    if alpha is not None:
        tensors |= {down.rpartition(".lora")[0] + ".alpha": np.array(alpha, np.float16)}
    save_file(tensors, tmp_path / "it.safetensors")
    adapter = load(tmp_path / "it.safetensors")["text/fc1[0:1, :, :]"]
    delta = adapter.delta(programs.PARAMS["text"]["fc1"])
    assert_array_equal(delta, np.stack([WANTED * scale, np.zeros((8, 6))]))


@pytest.mark.parametrize("module", ["to_q", "to_out"])
def test_processors_of_early_versions(module, tmp_path):
    a, b = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
    start = f"unet.blocks.1.attn.processor.{module}_lora"
    save_file({f"{start}.down.weight": a, f"{start}.up.weight": b}, tmp_path / "it.safetensors")
    (name,) = load(tmp_path / "it.safetensors")
    assert name.startswith(f"unet/blocks/{'q' if module == 'to_q' else 'out'}[1:2")


def test_halves_are_multiplied_exactly(tmp_path):
    start = "lora_te_layers_0_fc1.hada_w"
    tensors = {
        f"{start}{x}_{side}": np.random.default_rng(i).standard_normal(shape).astype(jnp.bfloat16)
        for i, (x, side, shape) in enumerate(
            [("1", "a", (6, 3)), ("1", "b", (3, 8)), ("2", "a", (6, 3)), ("2", "b", (3, 8))]
        )
    }
    save_file(tensors, tmp_path / "it.safetensors")
    (adapter,) = load(tmp_path / "it.safetensors").values()
    assert adapter.rank == 9
    assert adapter.a.dtype == adapter.b.dtype == np.float32
    one, two = (
        tensors[f"{start}{x}_a"].astype(np.float64) @ tensors[f"{start}{x}_b"].astype(np.float64)
        for x in "12"
    )
    delta = adapter.delta(programs.PARAMS["text"]["fc1"])[0]
    assert_allclose(delta, (one * two).T, rtol=1e-5, atol=1e-5)


def test_other_components_are_left_out_by_name_alone(tmp_path):
    path = tmp_path / "it.safetensors"
    save_file(
        {
            **dict(zip(SPELLINGS["kohya"], (A, B), strict=True)),
            "lora_te2_a.lora_down.weight": A,
            "lora_te2_a.lora_up.weight": B,
        },
        path,
    )
    with pytest.raises(ValueError, match=r"'lora_te2_a.lora_down.weight' .* no place, and ignore"):
        load(path)
    assert list(load(path, ignore=["lora_te2_.*"])) == ["text/fc1[0:1, :, :]"]


GOOD = dict(zip(SPELLINGS["diffusers"], (A, B), strict=True))
TOLD = {
    **{"text_encoder.r": 2, "text_encoder.lora_alpha": 4},
    "text_encoder.target_modules": ["layers.0.fc1"],
}
REFUSED = {
    "LoKr": (
        {"lora_te_layers_0_fc1.lokr_w1": A},
        {},
        "lokr_w1' of .* is not understood, and would be lost: LoKr is a product of Kronecker",
    ),
    "a difference": ({f"{MODULE}.diff": A}, {}, "it is the difference of a whole weight"),
    "a bias": ({f"{MODULE}.lora_B.bias": A}, {}, "would be lost: B has a bias; merge it"),
    "anything": ({"emb_params": A}, {}, "would be lost: names end in one of"),
    "no B": ({f"{MODULE}.lora_A.weight": A}, {}, "lora_A.weight', and no tensor B beside it"),
    "alpha alone": ({f"{MODULE}.alpha": A[0, 0]}, {}, "alpha', and no tensor A beside it"),
    "two of one": (
        GOOD | dict(zip(SPELLINGS["kohya"], (A, B), strict=True)),
        {},
        "has two tensors A of 'text_encoder.layers.0.fc1': ",
    ),
    "another shape": (
        GOOD | {f"{MODULE}.lora_A.weight": A[:, :7].copy()},
        {},
        r"must have the shape \(2, 8\) for 'text/fc1\[0:1.* got \(2, 7\)",
    ),
    "a window too many": (
        GOOD | {f"{MODULE}.lora_A.weight": np.ones((2, 8, 3, 3), np.float32)},
        {},
        r"must have the shape \(2, 8\) .* got \(2, 8, 3, 3\)",
    ),
    "norms of inputs": (
        GOOD | {f"{MODULE}.dora_scale": np.ones((1, 8), np.float32)},
        {},
        r"must have the norms of the 6 outputs along its first axis: got \(1, 8\)",
    ),
    "infinite alpha": (
        GOOD | {f"{MODULE}.alpha": np.array(np.inf)},
        {},
        "must be finite and not negative: got inf",
    ),
    "alphas": (GOOD | {f"{MODULE}.alpha": A[0]}, {}, r"must be one number: got the shape \(8,\)"),
    "alpha twice": (GOOD | {f"{MODULE}.alpha": A[0, 0]}, TOLD, "must tell alpha once"),
    "metadata of another rank": (
        GOOD,
        TOLD | {"text_encoder.r": 3},
        "rank of 'layers.0.fc1' must be 3, as its config says: got 2",
    ),
    "metadata of other targets": (
        GOOD,
        TOLD | {"text_encoder.target_modules": ["fc2"]},
        "factors of modules that its config does not name: 'layers.0.fc1'",
    ),
    "modules that are missing": (
        GOOD,
        TOLD | {"text_encoder.target_modules": ["fc1"]},
        "no factors of modules that its config names: 'layers.1.fc1'",
    ),
    "metadata of magnitudes": (
        GOOD,
        TOLD | {"text_encoder.use_dora": True},
        "use_dora of a config must say",
    ),
    "other mathematics": (
        GOOD,
        TOLD | {"text_encoder.use_bdlora": {"a": 1}},
        "lora_adapter_metadata of .* sets use_bdlora",
    ),
    "two magnitudes": (
        GOOD
        | {
            f"{MODULE}.dora_scale": np.ones((6, 1), np.float32),
            f"{MODULE}.lora_magnitude_vector": np.ones(6, np.float32),
        },
        {},
        "has two tensors .* of 'text_encoder.layers.0.fc1': ",
    ),
    "two spellings of one module": (
        {SPELLINGS["kohya"][0]: A, SPELLINGS["lycoris"][1]: B},
        {},
        "must spell 'text_encoder.layers.0.fc1' in one way: got",
    ),
    "metadata of another kind": (
        GOOD,
        TOLD | {"text_encoder.peft_type": "VERA"},
        "must be of LoRA's factors alone: got the peft_type 'VERA'",
    ),
    "metadata of what is not there": (
        GOOD,
        TOLD | {"text_encoder.modules_to_save": ["fc2"]},
        "must be of LoRA's factors alone: got .*modules_to_save",
    ),
    "no metadata": (GOOD, "{", "lora_adapter_metadata of .* is no JSON"),
    "metadata of a list": (GOOD, "[]", "must be an object of JSON"),
    "nothing": ({}, {}, "has no adapters: got 0 tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_or_misread_is_refused(what, tmp_path):
    tensors, metadata, message = REFUSED[what]
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    arrays = {name: np.asarray(x) for name, x in tensors.items()}
    said = {"lora_adapter_metadata": text} if metadata else None
    save_file(arrays, tmp_path / "it.safetensors", metadata=said)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "it.safetensors")


def test_what_is_ignored_switches_off_no_check_of_another_component(tmp_path):
    told = json.dumps(TOLD | {"text_encoder.target_modules": ["fc1"]})
    save_file(GOOD, tmp_path / "it.safetensors", metadata={"lora_adapter_metadata": told})
    with pytest.raises(ValueError, match="no factors of modules that its config names"):
        load(tmp_path / "it.safetensors", ignore=["unet.*"])


def test_text_encoders_of_a_transformer_are_spelled_as_in_kohya():
    names = ["transformer.a", "text_encoder.b", "text_encoder_2.c"]
    assert spellings.of_kohya(names, names) == {
        "transformer.a": "lora_unet_a",
        "text_encoder.b": "lora_te1_b",
        "text_encoder_2.c": "lora_te3_c",
    }
    assert spellings.spelled(names)["lora_te3_c"] == ["text_encoder_2.c"]
    names = [*names, "text_encoder_3.c"]
    assert spellings.of_kohya(names[:1], names) == {"transformer.a": "lora_unet_a"}
    assert spellings.of_kohya(names[2:], names) == {
        "text_encoder_2.c": "lora_te2_c",
        "text_encoder_3.c": "lora_te3_c",
    }
    assert spellings.spelled(names)["lora_te3_c"] == ["text_encoder_3.c"]


def test_a_spelling_of_two_modules_is_refused(tmp_path):
    names = Names(
        *programs.PAIRS[:1],
        ("unet.layers.{i}.fc1", "text/fc1[{i}]"),
        ("text_encoder.layers.{i}.fc1", "text/fc2[{i}]"),
    )
    save_file(dict(zip(SPELLINGS["lycoris"], (A, B), strict=True)), tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match=r"must be of one module: its name is a spelling of 'unet"):
        diffusion.load(tmp_path / "it.safetensors", sites=SITES, names=names)


def test_nothing_is_changed_is_a_warning(tmp_path):
    save_file({name: np.zeros_like(x) for name, x in GOOD.items()}, tmp_path / "it.safetensors")
    with pytest.warns(UserWarning, match="change nothing: all their products are 0"):
        load(tmp_path / "it.safetensors")


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_damaged_files_are_refused_by_name(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "it.safetensors"
    content = bytearray(data.draw(st.sampled_from(FILES)).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path.write_bytes(content)
    error = str(path)
    try:
        load(path)
    except ValueError as raised:
        error = str(raised)
    assert str(path) in error
