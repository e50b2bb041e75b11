"""Folders of adapters, against PEFT: what it saves is loaded here, what is saved here there."""

import warnings

import jax
import numpy as np
import programs_of_files
import pytest
import torch_programs
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora.formats import peft


def carried(program, folder, wanted):
    """Load what PEFT saved, check that it computes what is wanted, and save it for PEFT."""
    sites = jaxlora.find_sites(program.fn, program.params, program.x)
    adapters = peft.load(folder / "theirs", sites=sites, names=program.names)
    params = jaxlora.bind(program.params, adapters)
    got = jax.jit(jaxlora.lora(program.fn))(params, program.x)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    peft.save(folder / "ours", adapters, names=program.names, sites=sites)
    return sites, adapters


@pytest.mark.parametrize("name", programs_of_files.CASES)
@pytest.mark.filterwarnings("ignore:.*has also the weight that")
def test_an_adapter_travels_both_ways(name, tmp_path):
    case = programs_of_files.CASES[name]
    program, theirs = case.program(), torch_programs.adapted(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    wanted = torch_programs.output(theirs, case)
    plain = np.asarray(program.fn(program.params, program.x))
    assert np.abs(plain - wanted).max() > 1e-2 * np.abs(wanted).max()

    sites, adapters = carried(program, tmp_path, wanted)
    again = peft.load(tmp_path / "ours", sites=sites, names=program.names)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(assert_array_equal, again, adapters)
    back = torch_programs.output(torch_programs.loaded(case, tmp_path / "ours"), case)
    assert_allclose(back, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", programs_of_files.OTHER_KINDS)
def test_other_kinds_of_adapters_come_in_as_factors(name, tmp_path):
    case = programs_of_files.OTHER_KINDS[name]
    program, theirs = case.program(), torch_programs.adapted(case)
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = torch_programs.loaded(case, tmp_path / "theirs")  # without what lost its rank
    wanted = torch_programs.output(reloaded, case)

    carried(program, tmp_path, wanted)
    back = torch_programs.output(torch_programs.loaded(case, tmp_path / "ours"), case)
    assert_allclose(back, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
