"""Names that are found from shapes: those that are written by hand, or none."""

import bert
import jax
import jax.numpy as jnp
import language_models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlora
from jaxlora.formats import names as jaxlora_names
from jaxlora.formats.names import find
from jaxlora.formats.safetensors import entries
from jaxlora.weights import paths


def tensors(names, params, sites):
    """Return the shape of each tensor by its name in a file."""
    leaves, _ = paths.flatten(params)
    return {
        name if name.endswith(".bias") else f"{name}.weight": entry.form.tensor_shape
        for name, entry in entries.entries(leaves, names, sites).items()
    }


def program(name):
    params = language_models.shapes(getattr(language_models, name.upper()))
    sites = jaxlora.find_sites(getattr(language_models, name), params, language_models.TOKENS)
    return params, sites


def places(names, sites):
    table = names.table(sites.shapes)
    return {name: (str(place), place.layout) for name, place in table.items() if not place.is_bias}


def test_those_of_a_sentence_encoder_are_found():
    params, sites = bert.shapes_and_sites()
    found = find(tensors(bert.NAMES, params, sites), sites)
    assert found.table(sites.shapes).keys() == bert.NAMES.table(sites.shapes).keys()
    got, wanted = places(found, sites), places(bert.NAMES, sites)
    assert {k: path for k, (path, _) in got.items()} == {k: p for k, (p, _) in wanted.items()}
    matrices = [name for name in wanted if "LayerNorm" not in name]
    assert {k: got[k] for k in matrices} == {k: wanted[k] for k in matrices}


def test_those_of_gpt2_are_found_with_their_layout():
    params, sites = program("gpt2")
    wanted = language_models.GPT2_NAMES
    found = find(tensors(wanted, params, sites), sites)
    assert places(found, sites) == places(wanted, sites)


def test_what_shapes_and_words_leave_open_is_told():
    params, sites = program("llama")
    wanted, norms = language_models.LLAMA_NAMES, language_models._LLAMA[3:5]
    shapes = tensors(wanted, params, sites)
    with pytest.raises(ValueError, match=r"one choice for 10 of 12 kinds of tensors") as raised:
        find(shapes, sites)
    said = str(raised.value)
    assert "'model.layers.{i}.input_layernorm.weight' (16,) may be 'layers/norm_1[{i}]'" in said
    assert '("model.layers.{i}.self_attn.k_proj", "layers/k[{i}]"),' in said
    assert places(find(shapes, sites, known=norms), sites) == places(wanted, sites)


def test_a_tensor_without_a_leaf_is_told():
    params, sites = bert.shapes_and_sites()
    shapes = tensors(bert.NAMES, params, sites) | {"pooler.dense.weight": (384, 7)}
    with pytest.raises(ValueError, match=r"'pooler.dense.weight' \(384, 7\) may be no leaf"):
        find(shapes, sites)


def test_two_that_are_alike_are_not_guessed():
    def model(params, x):
        return x @ params["a"] @ params["b"]

    sites = jaxlora.find_sites(
        model, {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jnp.ones((2, 4))
    )
    with pytest.raises(
        ValueError, match=r"one choice for 0 of 2 .* 'one' \(4, 4\) may be 'a', 'b'"
    ):
        find({"one": (4, 4), "two": (4, 4)}, sites)
    named = find({"a.weight": (4, 4), "two.weight": (4, 4)}, sites)  # by its word, and what is left
    assert {n: p.path for n, p in named.table(sites.shapes).items()} == {"a": "a", "two": "b"}


def chain(tree, width):
    """Return the sites of a program that multiplies by matrices, and scales by what is none."""

    def model(params, x):
        for leaf in jax.tree.leaves(params):
            is_product = leaf.ndim == 2 and len(leaf) == x.shape[1]
            x = x @ leaf if is_product else x * leaf.reshape(-1, x.shape[1]).sum(0)[None]
        return x

    params = jax.tree.map(lambda size: jnp.ones(size), tree, is_leaf=lambda x: isinstance(x, tuple))
    return jaxlora.find_sites(model, params, jnp.ones((2, width)))


UNSURE = {
    "layers told apart by numbers": (
        {
            "Dense_0": {"kernel": (8, 8)},
            "Dense_1": {"kernel": (8, 8)},
            "Dense_2": {"kernel": (8, 3)},
        },
        {"net.1.weight": (8, 8), "net.3.weight": (8, 8), "net.5.weight": (3, 8)},
    ),
    "norms by a part of their names": (
        {"attention_norm": (8,), "ffn_norm": (8,), "w": (8, 3)},
        {
            **{"input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,)},
            "w.weight": (3, 8),
        },
    ),
    "a leaf for two tensors": (
        {"pos": (3, 8), "w": (8, 3)},
        {"p.weight": (3, 8), **{f"h.{i}.ln.weight": (8,) for i in range(3)}, "w.weight": (3, 8)},
    ),
}


@pytest.mark.parametrize("what", UNSURE)
def test_what_may_be_two_things_is_not_guessed(what):
    tree, shapes = UNSURE[what]
    with pytest.raises(ValueError, match=r"shapes leave one choice for|must make the names"):
        find(shapes, chain(tree, 8))


def test_which_axis_is_which_is_not_guessed():
    def model(params, x):
        def layer(x, own):
            w, norm = own
            for expert in w:
                x = x @ expert
            return x * norm[None], None

        return jax.lax.scan(layer, x, (params["w"].swapaxes(0, 1), params["norm"].T))[0]

    params = {"w": jnp.ones((2, 2, 4, 4)), "norm": jnp.ones((4, 2))}
    sites = jaxlora.find_sites(model, params, jnp.ones((3, 4)))
    shapes = {f"layers.{i}.experts.{j}.weight": (4, 4) for i in range(2) for j in range(2)}
    shapes |= {f"layers.{i}.norm.weight": (4,) for i in range(2)}
    with pytest.raises(ValueError, match=r"experts.{j}.weight' \(4, 4\) may be no leaf"):
        find(shapes, sites)
    known = [("layers.{i}.experts.{j}", "w[{j}, {i}]")]
    table = find(shapes, sites, known=known).table(sites.shapes)
    assert str(table["layers.1.norm"]) == "norm[:, 1:2]"


def test_what_is_known_tells_the_layout_of_square_weights():
    sites = chain({"qkv": (8, 24), "z": (24, 8), "o": (8, 8)}, 8)
    shapes = {"c_attn.weight": (8, 24), "c_proj.weight": (8, 8), "c_out.weight": (24, 8)}
    found = find(shapes, sites, known=[("c_attn", "qkv", "transposed")])
    table = found.table(sites.shapes)
    assert {place.layout for place in table.values()} == {"transposed"}


def test_tensors_of_no_module_are_named_as_such():
    sites = chain({"cls": (8,), "w": (8, 3)}, 8)
    table = find({"cls_token": (8,), "w.weight": (3, 8)}, sites).table(sites.shapes)
    assert table["cls_token"].layout == "tensor"


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_layers_of_different_widths_are_found(data):
    layers = data.draw(st.integers(2, 4))
    widths = data.draw(st.lists(st.integers(2, 9), min_size=2, max_size=5, unique=True))
    is_stack = data.draw(st.booleans())
    labels = [f"w{i}" for i in range(len(widths))]
    sizes = dict(zip(labels, zip(widths, [*widths[1:], widths[0]], strict=True), strict=True))
    make = jax.ShapeDtypeStruct
    if is_stack:
        params = {k: make((layers, *size), jnp.float32) for k, size in sizes.items()}

        def model(params, x):
            def layer(x, own):
                for label in labels:
                    x = x @ own[label]
                return x, None

            return jax.lax.scan(layer, x, params)[0]

    else:
        params = {
            f"block_{i}": {k: make(size, jnp.float32) for k, size in sizes.items()}
            for i in range(layers)
        }

        def model(params, x):
            for i in range(layers):
                for label in labels:
                    x = x @ params[f"block_{i}"][label]
            return x

    sites = jaxlora.find_sites(model, params, make((2, widths[0]), jnp.float32))
    theirs = data.draw(st.permutations([f"m{chr(97 + i)}" for i in range(len(widths))]))
    shapes = {
        f"h.{i}.{their}.weight": sizes[label][::-1]
        for i in range(layers)
        for their, label in zip(theirs, labels, strict=True)
    }
    table = find(shapes, sites).table(sites.shapes)
    assert len(table) == len(shapes)
    for i in range(layers):
        for their, label in zip(theirs, labels, strict=True):
            wanted = f"{label}[{i}:{i + 1}, :, :]" if is_stack else f"block_{i}/{label}"
            assert str(table[f"h.{i}.{their}"]) == wanted


def test_numbers_that_are_parts_of_names_stay():
    def model(params, x):
        for own in params["blocks"]:
            x = x @ own["up"] @ own["out"]["kernel"]
        return x

    block = {"up": jnp.ones((4, 6)), "out": {"kernel": jnp.ones((6, 4))}}
    sites = jaxlora.find_sites(model, {"blocks": [block, block]}, jnp.ones((2, 4)))
    shapes = {f"t.{i}.net.{n}.weight": s for i in (0, 1) for n, s in ((0, (6, 4)), (2, (4, 6)))}
    found = find(shapes, sites)
    assert str(found) == (
        'Names(\n    ("t.{i}.net.0", "blocks/{i}/up"),\n'
        '    ("t.{i}.net.2", "blocks/{i}/out/kernel"),\n)'
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (["a"], "torch_names must be the shape of each tensor by name: got list"),
        ({}, "torch_names must be the shape of each tensor by name"),
        ({"a": 3}, "got 3 for 'a'"),
        ({"a": np.ones(2)}, "must be the shape of each tensor by name: got .* for 'a'"),
    ],
)
def test_what_are_no_shapes_is_refused(shapes, message):
    _, sites = program("gpt2")
    with pytest.raises(TypeError, match=message):
        find(shapes, sites)
    assert jaxlora_names.find is find
