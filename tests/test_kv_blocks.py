"""Block tables against a model that keeps every sequence's tokens: no leak, no cross-talk."""

from __future__ import annotations

import random

import pytest

from tessella.kv.blocks import BlockTable, CacheFullError
from tessella.kv.prefix import PrefixTree

OPERATIONS = {"grow": 40, "open": 12, "fork": 12, "truncate": 12, "free": 14, "publish": 10}
"""How often each is drawn."""


class Fuzz:
    """Random operations on a block table, and what should come of them.

    `memory` plays the pages: a token written into a slot that somebody else still reads, a missed
    copy or a block freed too early shows as a token that is not the model's.
    """

    def __init__(self, seed: int, P: int, Z: int):
        self.rng = random.Random(seed)
        self.table = BlockTable(P, Z)
        self.memory = [[None] * Z for _ in range(P)]
        self.model: dict[int, list[int]] = {}
        self.prompts: list[list[int]] = []
        self.done = dict.fromkeys(OPERATIONS, 0)
        self.refused = 0
        self.reused = 0

    def step(self) -> None:
        name = self.rng.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
        if name != "open" and not self.model:
            name = "open"
        self.done[name] += 1
        getattr(self, name)()

    def pick(self) -> int:
        return self.rng.choice(list(self.model))

    def write(self, handles: list[int], counts: list[int], tokens: list[list[int]]) -> bool:
        """Append tokens through the table; False if it was refused, with nothing changed."""
        before = self.state()
        try:
            growth = self.table.grow(handles, counts)
        except CacheFullError as e:
            assert "full" in str(e)
            assert self.state() == before
            self.refused += 1
            return False
        for source, target in growth.copies:
            self.memory[target] = list(self.memory[source])
        slots = iter(growth.slots)
        for handle, new in zip(handles, tokens, strict=True):
            for token in new:
                block, place = divmod(next(slots), self.table.Z)
                assert self.table.pool.holders[block] == 1, "wrote into a shared block"
                self.memory[block][place] = token
            self.model[handle] += new
        assert next(slots, None) is None
        return True

    def grow(self) -> None:
        handles = self.rng.sample(list(self.model), min(len(self.model), self.rng.randint(1, 3)))
        counts = [self.rng.choice((0, 1, 1, 1, 2, 5, 9)) for _ in handles]
        self.write(handles, counts, [[self.rng.randrange(3) for _ in range(n)] for n in counts])

    def open(self) -> None:
        """A prompt that often begins as an earlier one did."""
        prompt = [self.rng.randrange(3) for _ in range(self.rng.randint(0, 14))]
        if self.prompts and self.rng.random() < 0.7:
            old = self.rng.choice(self.prompts)
            prompt = old[: self.rng.randint(0, len(old))] + prompt[:3]
        handle = self.table.open(prompt)
        found = self.table[handle].length
        assert found <= max(0, len(prompt) - 1)
        self.reused += found
        self.model[handle] = prompt[:found]
        self.check(handle)
        if not self.write([handle], [len(prompt) - found], [prompt[found:]]):
            self.table.free(handle)
            del self.model[handle]

    def fork(self) -> None:
        if len(self.model) > 12:
            return self.free()
        parent = self.pick()
        self.model[self.table.fork(parent)] = list(self.model[parent])

    def truncate(self) -> None:
        handle = self.pick()
        n = self.rng.randint(0, len(self.model[handle]))
        self.table.truncate(handle, n)
        del self.model[handle][n:]

    def free(self) -> None:
        handle = self.pick()
        self.table.free(handle)
        del self.model[handle]

    def publish(self) -> None:
        handle = self.pick()
        self.table.publish(handle, self.model[handle])
        self.prompts = [*self.prompts[-20:], list(self.model[handle])]

    def state(self):
        t = self.table
        return (list(t.pool.holders), t.pool.free, {h: self.read(h) for h in self.model})

    def read(self, handle: int) -> list[int]:
        seq, Z = self.table[handle], self.table.Z
        assert len(seq.blocks) == -(-seq.length // Z)
        return [self.memory[seq.blocks[i // Z]][i % Z] for i in range(seq.length)]

    def check(self, handle: int) -> None:
        assert self.read(handle) == self.model[handle]

    def check_all(self) -> None:
        """Every token, and every holder: sequences and the tree hold, and nobody else."""
        for handle in self.model:
            self.check(handle)
        holders = [0] * len(self.memory)
        for handle in self.model:
            for block in self.table[handle].blocks:
                holders[block] += 1
        for block in self.table.tree.blocks():
            holders[block] += 1
        assert holders == self.table.pool.holders
        assert self.table.pool.free == holders.count(0)
        assert self.table.pool.free <= self.table.available <= len(holders)


def run(seed: int, operations: int, P: int, Z: int) -> Fuzz:
    fuzz = Fuzz(seed, P, Z)
    for i in range(operations):
        fuzz.step()
        if i % 50 == 0:
            fuzz.check_all()
        elif fuzz.model:
            fuzz.check(fuzz.pick())
    fuzz.check_all()
    assert min(fuzz.done.values()) > operations // 30 and fuzz.refused and fuzz.reused
    fuzz.table.clear()
    fuzz.model.clear()
    fuzz.check_all()
    assert fuzz.table.pool.free == P, "blocks leaked"
    return fuzz


@pytest.mark.parametrize("seed, P, Z", [(1, 24, 4), (2, 9, 3), (3, 40, 1), (4, 30, 8)])
def test_random_operations(seed: int, P: int, Z: int):
    run(seed, 2000, P, Z)


@pytest.mark.slow
@pytest.mark.parametrize("seed, P, Z", [(5, 30, 4), (6, 24, 2)])
def test_a_hundred_thousand_random_operations(seed: int, P: int, Z: int):
    run(seed, 100_000, P, Z)


def test_the_fuzz_notices_a_missed_copy(monkeypatch):
    monkeypatch.setattr(BlockTable, "_must_copy", lambda self, seq: False)
    with pytest.raises(AssertionError):
        run(1, 2000, 24, 4)


def test_the_fuzz_notices_a_leak(monkeypatch):
    monkeypatch.setattr(PrefixTree, "_remove", lambda self, node: self._nodes.discard(node))
    with pytest.raises((AssertionError, IndexError)):
        run(1, 2000, 24, 4)


def test_a_prefix_is_found_to_the_token():
    table = BlockTable(16, 4)
    first = table.open()
    table.grow([first], [10])
    table.publish(first, list(range(10)))
    second = table.open([*range(9), 77, 78])
    assert table[second].length == 9
    assert table[second].blocks == table[first].blocks
    growth = table.grow([second], [2])
    assert growth.copies == [(table[first].blocks[2], table[second].blocks[2])]
    assert growth.slots == [table[second].blocks[2] * 4 + 1, table[second].blocks[2] * 4 + 2]
    third = table.open(list(range(8)))  # its last token is left to compute
    assert table[third].length == 7
    unrelated = table.open([5, 6, 7])
    assert table[unrelated].length == 0


def test_a_prefix_outlives_its_sequence_until_there_is_no_room():
    table = BlockTable(4, 2)
    first = table.open()
    table.grow([first], [8])
    table.publish(first, list(range(8)))
    table.free(first)
    assert table.pool.free == 0 and table.available == 4
    again = table.open([*range(4), 9])
    assert table[again].length == 4
    table.grow([again], [4])  # gives up the two blocks nobody reads
    assert table.open(list(range(8))) >= 0
    with pytest.raises(CacheFullError, match=r"1 tokens need 1 more pages of 2, .* at most the 0"):
        table.grow([again], [1])


def test_a_full_cache_changes_nothing():
    table = BlockTable(3, 4)
    a, b = table.open(), table.open()
    table.grow([a], [5])
    before = list(table.pool.holders)
    with pytest.raises(CacheFullError, match="full"):
        table.grow([a, b], [3, 5])
    assert table.pool.holders == before and table[a].length == 5 and table[b].length == 0
    table.grow([a, b], [3, 4])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda t, a: t.truncate(a, 6), "expected 0..5 tokens, got 6"),
        (lambda t, a: t.truncate(a, -1), "expected 0..5 tokens, got -1"),
        (lambda t, a: t.publish(a, [1, 2]), "ids of 5 tokens, got 2"),
        (lambda t, a: t.grow([a, a], [1, 1]), "different sequences"),
        (lambda t, a: t.grow([a], [-1]), "counts >= 0"),
        (lambda t, a: t.fork(17), "live sequence, got 17"),
    ],
)
def test_bad_input(call, words: str):
    table = BlockTable(3, 4)
    a = table.open()
    table.grow([a], [5])
    with pytest.raises(ValueError, match=words):
        call(table, a)
    assert table[a].length == 5
