"""Folders for PEFT: what is written, what is not, and what stays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import programs_of_files
import pytest
from folders import equal, load
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.formats import Names, peft


def test_parts_of_one_module_are_written_as_the_one_adapter_that_equals_them(tmp_path):
    params = {"qkv": programs_of_files.drawn(8, 12)}

    def fn(params, x):
        return x @ params["qkv"]

    x, names = programs_of_files.drawn(5, 8), Names(("c_attn", "qkv", "transposed"))
    for alphas in ({}, {"qkv[:, 8:12]": 3.0}):
        config = jaxlora.LoRAConfig(
            **{"rank": 2, "alpha": 4, "targets": ["qkv[:, 0:4]", "qkv[:, 8:12]"]},
            rank_pattern={"qkv[:, 8:12]": 1},
            alpha_pattern={"qkv[:, 8:12]": 2.0} | alphas,
        )
        _, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), fn, params, x, config=config))
        adapters = jax.tree.map(lambda factor: factor + 0.3, adapters)
        peft.save(tmp_path / "fused", adapters, names=names)
        found = jaxlora.find_sites(fn, params, x)
        fused = peft.load(tmp_path / "fused", sites=found, names=names)
        assert [adapter.rank for adapter in fused.values()] == [3]
        wanted = sum(adapter.delta(params["qkv"]) for adapter in adapters.values())
        assert_allclose(fused["qkv"].delta(params["qkv"]), wanted, rtol=1e-6)
        # and a part of it is a module of its own
        parts = Names(*((name, f"qkv[:, {4 * i}:{4 * i + 4}]") for i, name in enumerate("qkv")))
        peft.save(tmp_path / "parts", fused, names=parts)
        split = peft.load(tmp_path / "parts", sites=found, names=parts)
        assert_allclose(sum(x.delta(params["qkv"]) for x in split.values()), wanted, rtol=1e-6)


def adapters_of(program, **config):
    config = jaxlora.LoRAConfig(rank=2, **config)
    key = jax.random.key(0)
    params = jaxlora.init(key, program.fn, program.params, program.x, config=config)
    return jax.tree.map(lambda factor: factor + 0.1, jaxlora.split(params)[1])


def test_what_peft_cannot_say_is_not_written(tmp_path):
    program = programs_of_files.layers()
    adapters = adapters_of(program, targets=("up", "down"))
    mixed = adapters | {"up": adapters_of(program, targets=("up",), magnitude=True)["up"]}
    trained = adapters_of(program, targets=("up",), train=("head/kernel",))
    for what, names, message in (
        (adapters, Names(("a.{i}", "up[{i}]")), r"'down' of a weight of shape .* has no name"),
        (adapters, Names(("a", "up[0]"), ("b", "down[0]")), "has parts that have no name"),
        (mixed, program.names, "must have a magnitude, or none, for PEFT: 'layers.*up' has one"),
        (trained, program.names, "only the program tells how it lies: give sites="),
        ({"head/bias": trained["head/kernel"]}, program.names, "must have factors"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.save(tmp_path / "new", what, names=names)
        assert not (tmp_path / "new").exists()


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    program = programs_of_files.layers()
    first, second = (adapters_of(program, targets=(name,)) for name in ("up", "down"))
    target = tmp_path / "saved"
    peft.save(target, first, names=program.names)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # of the config, when the tensors are there
        with pytest.raises(OSError, match=r"cannot save to .*No space left.*is as it was"):
            peft.save(target, second, names=program.names)
    equal(load(target, program), first)
    assert [x.name for x in tmp_path.iterdir()] == ["saved"]
    peft.save(target, second, names=program.names)
    equal(load(target, program), second)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes.txt, which would be lost"):
        peft.save(target, first, names=program.names)


def test_a_tensor_of_no_module_is_not_written(tmp_path):
    def fn(params, x):
        return (x + params["cls"][None]) @ params["w"]

    x = programs_of_files.drawn(5, 8)
    params = {"cls": programs_of_files.drawn(8), "w": programs_of_files.drawn(8, 4)}
    config = jaxlora.LoRAConfig(rank=2, train=("cls",))
    adapted = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    names = Names(("cls_token", "cls", "tensor"), ("head", "w"))
    with pytest.raises(
        ValueError, match=r"'cls' is replaced, and is the tensor 'cls_token', which"
    ):
        peft.save(tmp_path / "it", jaxlora.split(adapted)[1], names=names)


def test_an_output_within_attention_has_its_rank_and_half_of_its_product(tmp_path):
    program = programs_of_files.attention()
    adapters = adapters_of(program, targets=("qkv", "out"))
    peft.save(tmp_path / "it", adapters, names=program.names)
    again = load(tmp_path / "it", program)
    for name, adapter in adapters.items():
        weight = program.params[name]
        assert_allclose(again[name].delta(weight), adapter.delta(weight), rtol=1e-6)
    other = adapters_of(program, targets=("qkv", "out"), rank_pattern={"out": 3})
    with pytest.raises(
        ValueError, match=r"adapts 'mha.out_proj' with the rank of 'mha', .*: 2; got 3"
    ):
        peft.save(tmp_path / "other", other, names=program.names)


def test_half_precision_keeps_its_bits(tmp_path):
    program = programs_of_files.layers()
    adapters = adapters_of(program, targets=("up",), dtype=jnp.bfloat16)
    peft.save(tmp_path / "half", adapters, names=program.names)
    again = load(tmp_path / "half", program)
    assert again["up"].a.dtype == jnp.bfloat16
    equal(again, adapters)
