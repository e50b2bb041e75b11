"""What adapters add to the collectives of a step on a slice of TPUs; see `benchmarks/tpu_mesh.py`.

Weights are gathered and passed on no more than in the step of the frozen model, and what is of the
size of the rank is little beside it. A program that says where its weights are gathered gathers the
codes of those in four bits.
"""

import compiled_for_tpu
import pytest

pytestmark = compiled_for_tpu.NEEDED


@pytest.mark.parametrize(
    ("case", "variant", "most"),
    [("8B on v5e-16", "lora", 1.001), ("8B on v5e-16, gathered", "nf4", 0.3)],
)
def test_weights_are_moved_no_more_than_in_the_frozen_models_step(tmp_path, case, variant, most):
    options = ("--cases", case, "--variants", variant)
    row = compiled_for_tpu.told("tpu_mesh.py", tmp_path, *options)[f"{case}: {variant}"]
    assert row["moved_gb_over_floor"] < most
    assert row["collectives_gb_over_floor"] < 1.03
