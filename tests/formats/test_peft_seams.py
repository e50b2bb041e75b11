"""Where a folder of PEFT and a tree do not say the same: nothing may be lost or misread there."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import programs_of_files as programs
import pytest
from folders import CONFIG, GOLDEN, PREFIX, TENSORS, adapted, equal, load
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import Names, peft


def made(folder, tensors, **config):
    """Write a folder of tensors without their prefix."""
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "0.21.2"} | config
    (folder / CONFIG).write_text(json.dumps(about))
    save_file({PREFIX + name: x for name, x in tensors.items()}, folder / TENSORS)
    return folder


def pair(module, in_, out):
    a, b = programs.drawn(2, in_), programs.drawn(out, 2)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def tied(params, tokens):
    x = params["wte"][tokens] @ params["w"]
    return x @ params["wte"].T


TIED = {"wte": programs.drawn(9, 8), "w": programs.drawn(8, 8)}
TIED_NAMES = Names(("wte", "wte", "embedding"), ("w", "w"))


def test_what_is_an_embedding_and_a_head_does_not_travel(tmp_path):
    tokens = np.arange(4)
    sites = jaxlora.find_sites(tied, TIED, tokens)
    whole = pair("w", 8, 8) | {"wte.weight": programs.drawn(9, 8)}
    rows = {"wte.lora_embedding_A": programs.drawn(2, 9)}
    rows |= {"wte.lora_embedding_B": programs.drawn(8, 2)}
    config = {"target_modules": ["w"], "modules_to_save": ["wte"]}
    head = Names(("lm_head", "wte"), ("w", "w"))
    message = "'wte' is looked up and multiplied, and PEFT changes"
    for name, tensors, how, names in (
        ("whole", whole, config, TIED_NAMES),
        ("rows", rows, {"target_modules": ["wte"]}, TIED_NAMES),
        ("head", pair("lm_head", 8, 9), {"target_modules": ["lm_head"]}, head),
    ):
        folder = made(tmp_path / name, tensors, **how)
        with pytest.raises(ValueError, match=message):
            peft.load(folder, sites=sites, names=names)
    for what in ({"targets": ("w",), "train": ("wte",)}, {"targets": ("wte",)}):
        adapters, sites = adapted(tied, TIED, tokens, **what)
        for names in (TIED_NAMES, head):
            with pytest.raises(ValueError, match=message):
                peft.save(tmp_path / "ours", adapters, names=names, sites=sites)


def test_an_adapter_of_a_changed_base_is_not_written(tmp_path):
    program = programs.layers()
    config = jaxlora.LoRAConfig(rank=2, targets=("up",), initializer="pissa")
    tree = jaxlora.init(jax.random.key(0), program.fn, program.params, program.x, config=config)
    with pytest.raises(ValueError, match=r"'up' started with 'pissa', .*jaxlora.algebra.rebase"):
        peft.save(tmp_path / "it", jaxlora.split(tree)[1], names=program.names)


LOST = {
    "a head": ("saved_head", ["head.weight"], "no tensors of what its config saves: 'head'"),
    "a bias of a head": ("saved_head", ["head.bias"], "what its config saves: 'head.bias'"),
    "biases": (
        "biases_of_targets",
        ["layers.0.up.base_layer.bias"],
        "what its config saves: 'layers.0.up.bias'",
    ),
    "tokens": (
        "tokens",
        ["embed.token_adapter.trainable_tokens_delta"],
        "has no rows of 'embed', which its config names",
    ),
    "an expert's A": ("experts", ["layers.1.experts.lora_A.weight"], "and no tensor A beside it"),
    "a layer of experts": (
        "experts",
        [f"layers.1.experts.{inner}lora_{x}.weight" for inner in ("", "base_layer.") for x in "AB"],
        r"a pair of factors for each of \['layers.1.experts.down', .*: got 0",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_the_config_promises_has_to_be_there(what, tmp_path):
    name, lost, message = LOST[what]
    shutil.copytree(GOLDEN / name, tmp_path / "it")
    arrays = load_file(tmp_path / "it" / TENSORS)
    for key in lost:
        del arrays[PREFIX + key]
    save_file(arrays, tmp_path / "it" / TENSORS)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "it", programs.CASES[name].program())


@pytest.mark.parametrize("rows", [[3, 1, 99], [3, 1, 1]])
def test_rows_are_different_and_there(rows, tmp_path):
    shutil.copytree(GOLDEN / "tokens", tmp_path / "it")
    about = json.loads((tmp_path / "it" / CONFIG).read_text())
    about["trainable_token_indices"] = {"embed": rows}
    (tmp_path / "it" / CONFIG).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must be different and below 11, the rows of 'embed'"):
        load(tmp_path / "it", programs.layers())


def test_sites_of_another_tree_are_refused(tmp_path):
    program = programs.layers()
    adapters, _ = adapted(program.fn, program.params, program.x, targets=("up",))
    inner = jaxlora.find_sites(
        lambda params, x: x @ params["w"], {"w": jnp.ones((8, 8))}, program.params["embed"]
    )
    with pytest.raises(ValueError, match="sites must be of this tree: the leaf 'up' has the shape"):
        peft.save(tmp_path / "it", adapters, names=program.names, sites=inner)


def test_a_norm_over_a_part_of_a_column_is_not_written(tmp_path):
    def fn(params, x):
        return jnp.einsum("tge,geo->to", x.reshape(3, 2, 4), params["w"])

    params, x = {"w": programs.drawn(2, 4, 5)}, programs.drawn(3, 8)
    adapters, sites = adapted(fn, params, x, magnitude=True)
    names = Names(("a", "w[0]"), ("b", "w[1]"))
    with pytest.raises(
        ValueError, match=r"magnitude of 'w\[0:1, :, :\]' cannot be written: the norm"
    ):
        peft.save(tmp_path / "it", adapters, names=names, sites=sites)


@pytest.mark.parametrize("spec", ["HWIO", "HWOI", "WHIO", "OIHW", "OIWH", "OHWI", "IHWO", "IOHW"])
def test_a_kernel_lies_as_its_program_says(spec, tmp_path):
    usual = {"w": programs.drawn(3, 3, 3, 3)}
    turned = {"w": usual["w"].transpose(["HWIO".index(axis) for axis in spec])}
    x, names = programs.drawn(2, 6, 6, 3), Names(("w", "w", "conv"))

    def convolved(spec):
        numbers = ("NHWC", spec, "NHWC")
        return lambda params, x: jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
        )

    adapters, sites = adapted(convolved("HWIO"), usual, x)
    peft.save(tmp_path / "it", adapters, names=names, sites=sites)
    there = jaxlora.find_sites(convolved(spec), turned, x)
    loaded = peft.load(tmp_path / "it", sites=there, names=names)
    got = jaxlora.lora(convolved(spec))(jaxlora.bind(turned, loaded), x)
    wanted = jaxlora.lora(convolved("HWIO"))(jaxlora.bind(usual, adapters), x)
    assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    peft.save(tmp_path / "again", loaded, names=names, sites=there)
    equal(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "it" / TENSORS))
    with pytest.raises(ValueError, match="is a kernel, and only the program tells which"):
        peft.save(tmp_path / "blind", adapters, names=names)


def test_the_order_of_parameters_is_told(tmp_path):
    params = {name: programs.drawn(3, 8, 8) for name in ("w1", "w3")}

    def fn(params, x):
        for w in params.values():
            x = jnp.einsum("eio,ni->no", w, x)
        return x

    x = programs.drawn(5, 8)
    config = {"targets": ("w1", "w3"), "stack": {"w1": (0,), "w3": (0,)}}
    adapters, sites = adapted(fn, params, x, **config)
    with pytest.raises(ValueError, match=r"order of .* in their module is not told: give names a"):
        peft.save(tmp_path / "it", adapters, names=Names(("experts.{p}", "{p}")), sites=sites)
    with pytest.raises(ValueError, match="needs the name of its module before its own"):
        peft.save(tmp_path / "it", adapters, names=Names(("a", "w1"), ("b", "w3")), sites=sites)
    told = Names(("experts.w3", "w3"), ("experts.w1", "w1"))
    peft.save(tmp_path / "it", adapters, names=told, sites=sites)
    equal(peft.load(tmp_path / "it", sites=sites, names=told), adapters)
    with pytest.raises(ValueError, match=r"order of .* in their module is not told: give names a"):
        peft.load(tmp_path / "it", sites=sites, names=Names(("experts.{p}", "{p}")))


def test_a_module_is_saved_whole_and_no_other_is_meant(tmp_path):
    program = programs.layers()
    how = {"targets": ("up",), "train": ("head/kernel",)}
    adapters, sites = adapted(program.fn, program.params, program.x, **how)
    with pytest.raises(
        ValueError, match=r"PEFT saves modules whole, .*'head.bias' must be trained"
    ):
        peft.save(tmp_path / "it", adapters, names=program.names, sites=sites)

    def fn(params, x):
        return x @ params["up"] @ params["inner"]

    params = {"up": programs.drawn(8, 8), "inner": programs.drawn(8, 8)}
    names = Names(("up", "up"), ("block.up", "inner"))
    adapters, sites = adapted(fn, params, programs.drawn(2, 8), targets=("up",))
    peft.save(tmp_path / "it", adapters, names=names, sites=sites)
    assert json.loads((tmp_path / "it" / CONFIG).read_text())["exclude_modules"] == ["block.up"]
    equal(peft.load(tmp_path / "it", sites=sites, names=names), adapters)


def test_a_module_that_was_saved_with_nan_is_read_as_it_is(tmp_path):
    shutil.copytree(GOLDEN / "saved_head", tmp_path / "it")
    tensors = load_file(tmp_path / "it" / TENSORS)
    tensors[f"{PREFIX}head.bias"][0] = np.nan
    save_file(tensors, tmp_path / "it" / TENSORS)
    found = load(tmp_path / "it", programs.layers())
    (bias,) = (x for path, x in found.items() if path.endswith("bias"))
    assert np.isnan(bias.value).sum() == 1


def test_an_embedding_is_called_one(tmp_path):
    program = programs.layers()
    adapters, sites = adapted(program.fn, program.params, program.x, targets=("embed",))
    with pytest.raises(ValueError, match="layout of 'embed' must be 'embedding' if and only if"):
        peft.save(tmp_path / "it", adapters, names=Names(("embed", "embed")), sites=sites)


BAD = {
    "deep": ("[" * 100_000, "is no JSON"),
    "no expression": (
        '{"peft_type": "LORA", "modules_to_save": ["head("]}',
        "no regular expression",
    ),
    "no alpha": ('{"peft_type": "LORA", "lora_alpha": 0}', "must be a number above 0: got 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_config_that_is_none_is_refused(what, tmp_path):
    content, message = BAD[what]
    shutil.copytree(GOLDEN / "lora", tmp_path / "it")
    (tmp_path / "it" / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "it", programs.layers())


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_factors_are_floating_and_not_cast(dtype, tmp_path):
    shutil.copytree(GOLDEN / "lora", tmp_path / "it")
    arrays = load_file(tmp_path / "it" / TENSORS)
    key = PREFIX + "layers.0.up.lora_A.weight"
    save_file(arrays | {key: arrays[key].astype(dtype)}, tmp_path / "it" / TENSORS)
    with pytest.raises(ValueError, match=r"must be floating, and of 64 bits only with jax_enable"):
        load(tmp_path / "it", programs.layers())


def test_patterns_of_layers_may_have_groups(tmp_path):
    shutil.copytree(GOLDEN / "some_layers", tmp_path / "it")
    about = json.loads((tmp_path / "it" / CONFIG).read_text())
    about["layers_pattern"] = "(layers|h)"
    (tmp_path / "it" / CONFIG).write_text(json.dumps(about))
    equal(load(tmp_path / "it", programs.layers()), load(GOLDEN / "some_layers", programs.layers()))


def test_a_parameter_for_experts_is_no_module_that_a_target_means(tmp_path):
    def fn(params, x):
        h = x @ params["down"]
        return h, jax.lax.scan(lambda x, w: (x @ w, None), h, params["experts"])[0]

    params = {"down": jnp.ones((4, 4)), "experts": jnp.ones((3, 4, 4))}
    names = Names(("mlp.down_proj", "down"), ("mlp.experts.down_proj", "experts"))
    sites = jaxlora.find_sites(fn, params, jnp.ones((2, 4)))
    config = jaxlora.LoRAConfig(rank=2, targets=("down",))
    adapted = jaxlora.init(jax.random.key(0), fn, params, jnp.ones((2, 4)), config=config)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, jaxlora.split(adapted)[1])
    peft.save(tmp_path / "it", adapters, names=names)
    about = json.loads((tmp_path / "it" / CONFIG).read_text())
    (tmp_path / "it" / CONFIG).write_text(json.dumps(about | {"target_modules": ["down_proj"]}))
    equal(peft.load(tmp_path / "it", sites=sites, names=names), adapters)
