"""What adapters add to the collectives of a step on a slice of TPUs; see `benchmarks/tpu_mesh.py`.

Weights are gathered and passed on no more than in the step of the frozen model over the same base,
and what is of the size of the rank is little beside it. A program that says where its weights are
gathered gathers the codes of those in four bits.
"""

import compiled_for_tpu
import pytest

pytestmark = compiled_for_tpu.NEEDED
CASES = ("8B on v5e-16", "8B on v5e-16, gathered")
LAYERS = 32


@pytest.fixture(scope="module", params=CASES)
def rows(request, tmp_path_factory):
    """Return what is told of a case, by variant."""
    folder, options = tmp_path_factory.mktemp("mesh"), ("--cases", request.param)
    found = compiled_for_tpu.told("tpu_mesh.py", folder, *options)
    return {name.rpartition(": ")[2]: row for name, row in found.items()}


@pytest.mark.parametrize("variant", ["lora", "nf4"])
def test_weights_are_moved_no_more_than_in_the_frozen_models_step(rows, variant):
    assert rows[variant]["moved_gb_over_floor"] < 1.001
    assert rows[variant]["collectives_gb_over_floor"] < 1.03


@pytest.mark.parametrize("rows", CASES[1:], indirect=True)
def test_codes_are_gathered_where_a_program_says_what_is(rows):
    assert rows["nf4"]["moved_gb"] < 0.3 * rows["lora"]["moved_gb"]


def test_factors_of_a_layer_are_gathered_at_once_where_the_compiler_is_told_to(tmp_path):
    options = ("--cases", CASES[1], "--variants", "lora", "--at-once", "1000000")
    found = compiled_for_tpu.told("tpu_mesh.py", tmp_path, *options)
    lora, floor = (found[f"{CASES[1]}: {name}"] for name in ("lora", "floor"))
    passes = 2  # forward, and again in the backward pass
    assert lora["all-gathers"] - floor["all-gathers"] == passes * LAYERS
    assert lora["moved_gb_over_floor"] < 1.001
