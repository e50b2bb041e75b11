"""Leaves that hold several modules of PEFT side by side."""

import programs_of_files as programs
import pytest
from folders import adapted, equal
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.formats import Names, peft


def fused(params, x):
    return x @ params["qv"] + params["bias"][None]


FUSED = {"qv": programs.drawn(8, 12), "bias": programs.drawn(12)}


def test_all_parts_of_a_replaced_leaf_have_names(tmp_path):
    x = programs.drawn(5, 8)
    adapters, sites = adapted(fused, FUSED, x, targets=("qv",), train=("bias",))
    both = [(name, f"qv[:, {at}]") for name, at in (("q", ":6"), ("v", "6:"))]
    biases = [("q.bias", "bias[:6]"), ("v.bias", "bias[6:]")]
    with pytest.raises(ValueError, match=r"'bias' has parts that have no name .*: got 6, with"):
        peft.save(tmp_path / "it", adapters, names=Names(*both, biases[0]), sites=sites)
    names = Names(*both, *biases)
    peft.save(tmp_path / "it", adapters, names=names, sites=sites)
    again = peft.load(tmp_path / "it", sites=sites, names=names)
    equal(again["bias"], adapters["bias"])
    delta = sum(term.delta(FUSED["qv"]) for name, term in again.items() if name != "bias")
    assert_allclose(delta, adapters["qv"].delta(FUSED["qv"]), rtol=1e-6)


def test_a_fused_leaf_with_a_magnitude_comes_back_as_parts(tmp_path):
    x = programs.drawn(5, 8)
    adapters, sites = adapted(fused, FUSED, x, targets=("qv",), magnitude=True)
    names = Names(("q", "qv[:, :6]"), ("v", "qv[:, 6:]"))
    peft.save(tmp_path / "it", adapters, names=names, sites=sites)
    again = peft.load(tmp_path / "it", sites=sites, names=names)
    assert sorted(again) == ["qv[:, 0:6]", "qv[:, 6:12]"]
    run = jaxlora.lora(fused)
    wanted, got = (run(jaxlora.bind(FUSED, found), x) for found in (adapters, again))
    assert_allclose(got, wanted, rtol=1e-5)
