"""`benchmarks/collectives.py`, on lines that the compiler for TPU wrote."""

import collectives
import pytest

pytestmark = pytest.mark.once

PROGRAM = """\
%fused.1 { # a gather, as it begins, goes on beside two products, and ends
  %all-gather.1 = bf16[1,3584,4096]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7
}
%fused.2 {
  %all-gather.2 = bf16[1,3584,4096]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7
}
%fused.3 {
  ROOT %all-gather.3 = bf16[1,3584,4096]{2,1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7
}
ENTRY %main {
  %all-gather.4 = bf16[4096,48]{1,0:T(8,128)} all-gather(%p.4), channel_id=8, dimensions={0}
  %all-gather-start.5 = (s8[8,16]{1,0}, s8[32,16]{1,0}) all-gather-start(%p.5), channel_id=9
  %all-gather-done.5 = s8[32,16]{1,0} all-gather-done(%all-gather-start.5)
  %all-reduce.6 = (bf16[4,8]{1,0}, f32[]{:T(128)}) all-reduce(%p.6, %p.7), channel_id=10
  %passed = (bf16[3584,1,1024]{2,1,0}, bf16[3584,1,1024]{2,1,0:S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%p.8), channel_id=11
  %done = bf16[3584,1,1024]{2,1,0} collective-permute-done(%passed)
}
"""


def test_each_is_counted_once_with_the_bytes_that_come():
    weight, passed_on = 3584 * 4096 * 2, 3584 * 1024 * 2
    assert collectives.count(PROGRAM) == {
        "all-gathers": 3,
        "all-reduces": 1,
        "reduce-scatters": 0,
        "all-to-alls": 0,
        "collective-permutes": 1,
        "all-gather_gb": pytest.approx((weight + 4096 * 48 * 2 + 32 * 16) / 1e9),
        "all-reduce_gb": pytest.approx((4 * 8 * 2 + 4) / 1e9),
        "reduce-scatter_gb": 0,
        "all-to-all_gb": 0,
        "collective-permute_gb": pytest.approx(passed_on / 1e9),
        "moved_gb": pytest.approx((weight + passed_on) / 1e9),
        "collectives_gb": pytest.approx(
            (weight + 4096 * 48 * 2 + 32 * 16 + 4 * 8 * 2 + 4 + passed_on) / 1e9
        ),
    }
