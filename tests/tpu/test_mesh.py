"""What adapters add to the collectives of a step on a slice of TPUs; see `benchmarks/tpu_mesh.py`.

Weights are gathered and passed on no more than in the step of the frozen model, and what is of the
size of the rank is little beside it.
"""

import compiled_for_tpu

pytestmark = compiled_for_tpu.NEEDED
CASE = "8B on v5e-16"


def test_weights_are_moved_no_more_than_in_the_frozen_models_step(tmp_path):
    options = ("--cases", CASE, "--variants", "lora")
    row = compiled_for_tpu.told("tpu_mesh.py", tmp_path, *options)[f"{CASE}: lora"]
    assert row["moved_gb_over_floor"] < 1.001
    assert row["collectives_gb_over_floor"] < 1.03
