"""The planner of attention: every visible pair of a query row and a key in exactly one task."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from command import one_object, refused, run
from tessella import _native, ops
from tessella.formats_kv import MASKS, MsmBatch
from tessella.ref import msm as ref

needs_native = pytest.mark.skipif(_native._C is None, reason="needs compiled kernels")


def parts(words: list[int]) -> tuple[dict, np.ndarray, np.ndarray]:
    """(header, tasks [n, 8], merges [n, 5]) of a plan."""
    w = np.asarray(words, dtype=np.int64)
    names = ("magic", "words", "B", "T", "H", "J", "tasks", "merges", "partial_rows", "units")
    names += ("split", "window", "big")
    header = dict(zip(names, w[: len(names)].tolist(), strict=True))
    end = ref.HEADER + ref.TASK * header["tasks"]
    assert header["magic"] == ref.MAGIC and header["words"] == len(w) >= header["partial_rows"]
    merges = w[end : end + ref.MERGE * header["merges"]]
    return header, w[ref.HEADER : end].reshape(-1, 8), merges.reshape(-1, 5)


def make(q_len, kv_len, mask, H=8, J=2, window=0, units=4, split=0) -> dict:
    return _native._C.plan_msm(q_len, kv_len, mask, H, J, window, units, split)


requests = st.lists(
    st.tuples(st.integers(0, 70), st.integers(0, 3000), st.integers(0, 3)), min_size=1, max_size=6
)


@needs_native
@settings(max_examples=120, deadline=None)
@given(
    requests,
    st.sampled_from([(8, 2), (4, 4), (7, 1), (32, 8)]),
    st.integers(1, 400),
    st.integers(1, 300),
    st.sampled_from([0, 0, 256, 1024]),
)
def test_every_visible_pair_is_covered_once(batch, heads, window, units, split):
    q_len = [q for q, _, _ in batch]
    kv_len = [q + kv for q, kv, _ in batch]
    mask, (H, J) = [m for _, _, m in batch], heads
    plan = make(q_len, kv_len, mask, H, J, window, units, split)
    header, tasks, merges = parts(plan["words"])
    assert plan["error"] == ""
    tall = tasks[:, 1] >= 64  # they stand first; both parts longest first
    assert tall.sum() == header["big"] and tall[: header["big"]].all()
    assert all((np.diff(part[:, 7]) <= 0).all() for part in (tasks[tall], tasks[~tall]))
    rows_of = [n * H // J for n in q_len]
    count = [np.zeros((r, kv), np.int8) for r, kv in zip(rows_of, kv_len, strict=True)]
    written = [np.zeros(r, np.int8) for r in rows_of]
    used = np.zeros(header["partial_rows"], np.int8)
    for b, tile, row0, rows, begin, end, partial, cost in tasks:
        assert rows <= tile and tile in ref.TILES and cost > 0
        assert begin % 16 == 0
        count[b][row0 : row0 + rows, begin:end] += 1
        if partial < 0:
            written[b][row0 : row0 + rows] += 1
        else:
            used[partial : partial + rows] += 1
    for b, row0, rows, partial, n in merges:
        written[b][row0 : row0 + rows] += 1
        used[partial : partial + n * rows] -= 1
    assert all((w == 1).all() for w in written) and (used == 0).all()
    cu = torch.tensor([0, *q_len]).cumsum(0).int()
    description = MsmBatch(
        torch.empty(len(q_len), 0, dtype=torch.int32),
        cu,
        torch.tensor(kv_len, dtype=torch.int32),
        torch.tensor([MASKS["causal"] if m == 3 else m for m in mask], dtype=torch.int32),
    )
    for b in range(len(q_len)):
        assert count[b].max(initial=0) <= 1
        seen = ref.visible(description, b, window)
        if mask[b] == 3:  # a tree may see any of its tokens
            seen[:, kv_len[b] - q_len[b] :] = True
        seen = seen.repeat_interleave(H // J, 0).numpy()
        assert (count[b][seen] == 1).all()


@needs_native
def test_order_is_longest_first_and_the_giant_is_shared():
    q_len, kv_len = [1] * 64, [100_000] + [50] * 63
    _, tasks, merges = parts(make(q_len, kv_len, [1] * 64, units=16)["words"])
    cost = tasks[:, 7]
    assert (np.diff(cost) <= 0).all() and len(merges) == 1
    per_worker = cost.sum() / 16
    assert cost[0] <= max(per_worker, 16 * (256 + 64))


@needs_native
@pytest.mark.parametrize("q, least", [(1, 256), (15, 256), (31, 512)])
def test_a_part_has_four_keys_a_row_of_its_tile(q, least):
    """However many workers there are: what a part leaves to the merge grows with its rows."""
    plan = make([q] * 4, [4096] * 4, [3] * 4, H=32, J=8, units=10_000)
    _, tasks, merges = parts(plan["words"])
    assert set(tasks[:, 5] - tasks[:, 4]) == {least}
    assert merges[:, 4].tolist() == [4096 // least] * 4


@needs_native
def test_a_request_without_keys_is_one_task_however_many_workers():
    batch = MsmBatch(
        torch.zeros(2, 20, dtype=torch.int32),
        torch.tensor([0, 50, 114], dtype=torch.int32),
        torch.tensor([0, 300], dtype=torch.int32),
        torch.tensor([MASKS["full"], MASKS["causal"]], dtype=torch.int32),
    )
    _, tasks, _ = parts(ops.msm_plan(batch, 8, 2, units=132).tolist())
    assert sorted(tasks[tasks[:, 0] == 0][:, 2].tolist()) == [0, 128]


@needs_native
def test_a_fixed_split_makes_tasks_that_do_not_depend_on_neighbours():
    def tasks_of(q_len, kv_len, b):
        _, tasks, _ = parts(make(q_len, kv_len, [1] * len(q_len), units=7, split=512)["words"])
        mine = tasks[tasks[:, 0] == b][:, 1:6]
        return sorted(map(tuple, mine.tolist()))

    alone = tasks_of([5], [3000], 0)
    assert alone == tasks_of([9, 5, 1], [9000, 3000, 1], 1)
    assert {t[3] % 512 for t in alone} == {0}


@needs_native
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[:10], "too short"),
        (lambda w: torch.cat([w[:0].new_zeros(1), w[1:]]), "not a plan"),
        (lambda w: w[:-1], "length"),
        (lambda w: torch.cat([w[:2], w[2:3] + 1, w[3:]]), "made for"),
        (lambda w: torch.cat([w[:21], w[21:22] + 500, w[22:]]), "task 0"),
        (lambda w: torch.cat([w[:21], w[21:22] - 20, w[22:]]), "covers other"),
    ],
    ids=["short", "magic", "length", "batch", "task", "coverage"],
)
def test_a_stale_or_broken_plan_is_refused(change, message):
    from tessella.formats_kv import KVPages

    batch = MsmBatch(
        torch.zeros(1, 8, dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
        torch.tensor([64], dtype=torch.int32),
    )
    cache, q = KVPages.empty(1, 1, 16, 16, torch.float32), torch.zeros(2, 1, 16)
    plan = ops.msm_plan(batch, 1, 1)
    ops.msm_attn(q, cache, batch, plan=plan)
    with pytest.raises(RuntimeError, match=f"plan: expected a plan for this batch.*{message}"):
        ops.msm_attn(q, cache, batch, plan=change(plan).contiguous())


@needs_native
def test_plan_of_the_command_line():
    answer = one_object(run("plan", "msm", "362:1318", "1:1657", "53:2036:tree", "--json").stdout)
    plan = answer["plan"]
    assert plan["tasks"] == len(plan["table"]) and plan["table"][0]["cost"] >= 1
    assert {t["tile"] for t in plan["table"]} <= set(ref.TILES)
    shown = run("plan", "msm", "8x1:4096", "--units", 264, "--heads", "32:8:128")
    assert shown.exit_code == 0 and "B=8" in shown.stdout
    refused(run("plan", "msm", "5:3"), "5:3", "kv")
    assert run("plan", "msm", "nonsense").exit_code == 2
    assert run("plan", "msm").exit_code == 2


@needs_native
def test_the_planner_never_loads_torch():
    code = (
        "import importlib.util as u, sys; "
        f"s = u.spec_from_file_location('_C', {_native._C.__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.plan_msm([1], [5], [1], 8, 2)['text']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1 tasks x 2 heads" in done.stdout, done.stderr
