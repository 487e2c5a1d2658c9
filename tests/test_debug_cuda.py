"""TESSELLA_DEBUG=1 on a GPU: an index outside the cache stops the kernel before it is used."""

import subprocess
import sys

import pytest

from command import environment

pytestmark = pytest.mark.gpu
SCRIPT = """
import sys
import torch
from tessella import ops
from tessella.formats_kv import KV4Pages, KVCodec, KVPages, MsmBatch

what, wrong, rows = sys.argv[1], sys.argv[2] == "wrong", int(sys.argv[3])
P, J, Z, D = 4, 2, 16, 64
coded = what.startswith("coded")
plain = lambda: KVPages.empty(P, J, Z, D, device="cuda")
codes = lambda: KV4Pages(
    torch.zeros(P, J, KVCodec().page_bytes(Z, D), dtype=torch.uint8, device="cuda"), KVCodec(), Z, D
)
cache = codes() if coded else plain()
if what.endswith("slot"):
    x = torch.randn(3, J, D, device="cuda").bfloat16()
    slots = torch.tensor([0, P * Z if wrong else 5, -1], device="cuda")
    (ops.kv4_append if coded else ops.msm_append)(x, x, slots, cache)
else:
    table = torch.tensor([[1, P if wrong else 3, 0, 2, 1, 1]], dtype=torch.int32)
    lengths = torch.tensor([0, rows]).int(), torch.tensor([max(rows, 30)]).int()
    batch = MsmBatch(table, *lengths)
    plan = ops.msm_plan(batch, 2 * J, J, units=1).cuda()
    there = MsmBatch(table.cuda(), *(t.cuda() for t in lengths))
    q = torch.randn(rows, 2 * J, D, device="cuda").bfloat16()
    (ops.kv4_attn if coded else ops.msm_attn)(q, cache, there, plan=plan)
torch.cuda.synchronize()
print("reached the end")
"""


CASES = [
    ("page", 1), ("page", 12), ("page", 70), ("coded page", 1), ("coded page", 70),
    ("slot", 0), ("coded slot", 0),
]  # fmt: skip


@pytest.mark.parametrize("what, rows", CASES)
def test_an_index_outside_the_cache_stops_the_kernel(what, rows):
    ends = []
    for right in ("right", "wrong"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, what, right, str(rows)],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(TESSELLA_DEBUG="1"),
        )
        ends.append((done.returncode, "reached the end" in done.stdout))
    assert ends[0] == (0, True), done.stderr
    assert ends[1][0] != 0 and not ends[1][1]
    assert "CUDA error" in done.stderr
