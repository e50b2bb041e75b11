"""What PEFT has other kinds of adapters for, read as the two factors that each amounts to."""

import json
import shutil

import numpy as np
import programs_of_files
import pytest
from folders import CONFIG, GOLDEN, PREFIX, TENSORS, equal, load, sites
from numpy.testing import assert_allclose
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import peft

KINDS = programs_of_files.OTHER_KINDS


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_computes_what_it_does_in_peft(name, tmp_path):
    program = KINDS[name].program()
    adapters = load(GOLDEN / name, program)
    wanted = np.load(GOLDEN / name / "output.npy")
    got = jaxlora.lora(program.fn)(jaxlora.bind(program.params, adapters), program.x)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    peft.save(tmp_path / "ours", adapters, names=program.names, sites=sites(program))
    equal(load(tmp_path / "ours", program), adapters)


def edited(tmp_path, name, *, config=None, edit=lambda tensors: None):
    target = tmp_path / "folder"
    shutil.copytree(GOLDEN / name, target)
    about = json.loads((target / CONFIG).read_text()) | (config or {})
    (target / CONFIG).write_text(json.dumps(about))
    tensors = load_file(target / TENSORS)
    edit(tensors)
    save_file(tensors, target / TENSORS)
    return target


@pytest.mark.parametrize("ending", ["_lora_latent_mapping", ".default_lora_latent_mapping"])
def test_a_matrix_between_the_factors_is_multiplied_in(ending, tmp_path):
    program, added = programs_of_files.layers(), {}

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            matrix = programs_of_files.drawn(2, 2)
            added[name.removesuffix(".lora_A.weight").removeprefix(PREFIX)] = matrix
            tensors[name.removesuffix(".lora_A.weight") + f"{ending}.weight"] = matrix

    adapters = load(edited(tmp_path, "lora", edit=edit), program)
    plain = load(GOLDEN / "lora", program)
    for i in range(3):
        matrix = added[f"layers.{i}.up"]  # (out, in) of the two ranks
        wanted = plain["up"].a[i] @ matrix.T @ plain["up"].b[i] * plain["up"].scaling
        got = adapters["up"].a[i] @ adapters["up"].b[i] * adapters["up"].scaling
        assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_module_that_has_lost_all_of_its_rank_has_no_adapter(tmp_path):
    pattern = json.loads((GOLDEN / "singular_values" / CONFIG).read_text())["rank_pattern"]
    pattern["layers.1.up.lora_E"] = [False] * 3

    def edit(tensors):
        for kind, shape in {"A": (0, 8), "B": (12, 0), "E": (0, 1)}.items():
            tensors[f"{PREFIX}layers.1.up.lora_{kind}"] = np.zeros(shape, np.float32)

    folder = edited(tmp_path, "singular_values", config={"rank_pattern": pattern}, edit=edit)
    adapters = load(folder, programs_of_files.layers())
    assert {name.partition("[")[0] for name in adapters} == {"up", "down"}
    assert not any(name.startswith("up[1:2") for name in adapters)


SHARED = "base_model.vera_A"


def test_patterns_of_alpha_do_not_scale_singular_values(tmp_path):
    folder = edited(tmp_path, "singular_values", config={"alpha_pattern": {"up": 9}})
    program = programs_of_files.layers()
    equal(load(folder, program), load(GOLDEN / "singular_values", program))


REFUSED = {
    "a projection of another kind": (
        "elementwise",
        lambda tensors: tensors.update({SHARED: np.ones((4, 12), np.float32)}),
        "has tensors that are not understood, which would be lost: base_model.vera_A",
    ),
    "no projections": (
        "projections",
        lambda tensors: tensors.pop(SHARED),
        "must have .*vera_A.*, which torch would draw again .*save_projection=True",
    ),
    "a projection of another shape": (
        "projections",
        lambda tensors: tensors.update({SHARED: np.ones((4, 7), np.float32)}),
        r"must be one weight of at most 7 in and 12 out, .*: got \(1, 12, 8\)",
    ),
    "another rank of a projection": (
        "projections",
        lambda tensors: tensors.update({SHARED: np.ones((3, 12), np.float32)}),
        r"must be \(rank, in\) and \(out, rank\)",
    ),
    "half of a vector": (
        "projections",
        lambda tensors: tensors.pop(f"{PREFIX}layers.0.up.vera_lambda_d"),
        "layers.0.up.vera_lambda_b', and no tensor lambda_d beside it",
    ),
    "half of a product": (
        "elementwise",
        lambda tensors: tensors.pop(f"{PREFIX}layers.0.up.hada_w2_b"),
        "layers.0.up.hada_w1_a', and no tensor w2_b beside it",
    ),
    "no singular values": (
        "singular_values",
        lambda tensors: tensors.pop(f"{PREFIX}layers.0.up.lora_E"),
        "must have tensors of AdaLoRA, as the peft_type 'ADALORA' says: got .*, of LoRA",
    ),
    "two forms at once": (
        "elementwise",
        lambda tensors: tensors.update(
            {f"{PREFIX}layers.0.up.lora_A.weight": np.ones((2, 8), np.float32)}
        ),
        "tensors of one module that do not belong together: .*hada_w1_a.*lora_A",
    ),
    "another rank": (
        "singular_values",
        lambda tensors: [
            tensors.update({f"{PREFIX}layers.0.up.lora_{kind}": np.ones(shape, np.float32)})
            for kind, shape in {"A": (1, 8), "B": (12, 1), "E": (1, 1)}.items()
        ],
        r"rank of 'layers.0.up' must be \d, as its config says: got 1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_whole_is_refused(what, tmp_path):
    name, edit, message = REFUSED[what]
    folder = edited(tmp_path, name, edit=edit)
    with pytest.raises(ValueError, match=message):
        load(folder, programs_of_files.layers())
