"""`benchmarks/collectives.py`, on lines as the compiler for TPU writes them."""

import collectives
import pytest

pytestmark = pytest.mark.once

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%begins (p.1: bf16[1,3584,1024]) -> bf16[1,3584,4096] {
  %all-gather.1 = bf16[1,3584,4096]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7
}

%goes_on (p.2: bf16[1,3584,1024]) -> bf16[1,3584,4096] {
  %all-gather.2 = bf16[1,3584,4096]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7
}

%of_window (p.3: (u32[], bf16[3584,1,1024])) -> (u32[], bf16[3584,1,1024]) {
  %passed = (bf16[3584,1,1024]{2,1,0}, bf16[3584,1,1024]{2,1,0:S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%p.3), channel_id=11
  %done = bf16[3584,1,1024]{2,1,0} collective-permute-done(%passed)
}

%window_goes_on (p.4: (u32[], bf16[3584,1,1024])) -> pred[] {
  %constant.4 = u32[]{:T(128)} constant(8), metadata={op_name="jit(step)/while"}
  ROOT %compare.4 = pred[]{:T(512)} compare(%p.4, %constant.4), direction=LT
}

%layer (p.5: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %fusion.5 = bf16[1,3584,4096]{2,1,0} fusion(%p.5), kind=kCustom, calls=%begins
  %fusion.6 = bf16[1,3584,4096]{2,1,0} fusion(%fusion.5), kind=kOutput, calls=%goes_on
  %while.5 = (u32[], bf16[3584,1,1024]) while(%p.5), condition=%window_goes_on, body=%of_window
  %all-reduce.5 = (bf16[4,8]{1,0}, f32[]{:T(128)}) all-reduce(%p.5, %p.5), channel_id=10
}

%layers_go_on (p.6: (s32[], bf16[8,16])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(3)
  ROOT %lt.6 = pred[]{:T(512)} compare(%p.6, %constant.6), direction=LT
}

ENTRY %main (p.7: s8[8,16]) -> s8[32,16] {
  %all-gather-start.7 = (s8[8,16]{1,0}, s8[32,16]{1,0}) all-gather-start(%p.7), channel_id=9
  %all-gather-done.7 = s8[32,16]{1,0} all-gather-done(%all-gather-start.7)
  %all-gather.8 = (bf16[4096,48]{1,0}, bf16[4096,48]{1,0}) all-gather(%p.7, %p.7), channel_id=12
  %while.7 = (s32[], bf16[8,16]) while(%p.7), condition=%layers_go_on, body=%layer
}
"""


def test_each_is_counted_as_often_as_it_runs_with_the_bytes_that_come():
    weight, passed_on, factors = 3584 * 4096 * 2, 3584 * 1024 * 2, 2 * 4096 * 48 * 2
    sizes = {
        "all-gather_gb": 3 * weight + factors + 32 * 16,
        "all-reduce_gb": 3 * (4 * 8 * 2 + 4),
        "reduce-scatter_gb": 0,
        "all-to-all_gb": 0,
        "collective-permute_gb": 3 * 8 * passed_on,
    }
    assert collectives.count(PROGRAM) == pytest.approx(
        {
            "all-gathers": 3 + 2,
            "all-reduces": 3,
            "reduce-scatters": 0,
            "all-to-alls": 0,
            "collective-permutes": 3 * 8,
            **{name: size / 1e9 for name, size in sizes.items()},
            "moved_gb": (3 * weight + 3 * 8 * passed_on) / 1e9,
            "collectives_gb": sum(sizes.values()) / 1e9,
        }
    )
