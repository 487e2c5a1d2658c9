"""Pages of a cache as numbers: who holds which, and which are free. No tensors here.

A sequence is a list of blocks (page numbers) and a length; token i lies in slot ``i % Z`` of block
``i // Z``. Blocks are shared by counting their holders: a fork holds the same blocks as its parent,
and a tree of finished prompts (:mod:`tessella.kv.prefix`) holds what later prompts may begin with.
A block is written only by its one holder. Whoever must write into a shared block gets a new one and
the page is copied, so sharing is exact to the token although blocks are whole pages (the token-wise
prefix reuse of XY-Serve).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tessella.kv.prefix import PrefixTree


class CacheFullError(RuntimeError):
    """The cache has no room for what was asked; nothing was changed."""


class BlockPool:
    """P blocks and the number of holders of each."""

    def __init__(self, P: int):
        self.holders = [0] * P
        self._free = list(range(P - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks without a holder."""
        return len(self._free)

    def extend(self, more: int) -> None:
        """Add free blocks, numbered on from the last."""
        P = len(self.holders)
        self.holders += [0] * more
        self._free[:0] = range(P + more - 1, P - 1, -1)

    def take(self) -> int:
        """A free block, held once; the caller has made sure that there is one."""
        block = self._free.pop()
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder."""
        self.holders[block] += 1

    def drop(self, block: int) -> None:
        """One holder less; without any the block is free."""
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self._free.append(block)


@dataclass
class Sequence:
    """A sequence's blocks and tokens."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens stored."""


@dataclass(frozen=True)
class Growth:
    """What appending tokens to sequences asks of the pages."""

    slots: list[int]
    """For each new token in order: block * Z + place in the block."""
    copies: list[tuple[int, int]]
    """(from, to) blocks whose pages are copied before anything is written."""


class BlockTable:
    """The sequences of one pool of P blocks of Z tokens.

    Every method either does all of what it says or raises before changing anything.
    """

    def __init__(self, P: int, Z: int):
        self.Z = Z
        self.pool = BlockPool(P)
        self.tree = PrefixTree(Z, self.pool)
        self.sequences: dict[int, Sequence] = {}
        self._next = 0

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones, and those only the prefix tree holds."""
        return self.pool.free + self.tree.evictable()

    def open(self, tokens: list[int] | None = None) -> int:
        """A new sequence, beginning with the longest stored prefix of `tokens` but their last.

        The last token is left out because its logits are still wanted. `length` of the sequence
        tells how many tokens are there already.
        """
        seq = Sequence()
        if tokens:
            seq.blocks, seq.length = self.tree.match(tokens[:-1])
            for block in seq.blocks:
                self.pool.hold(block)
        return self._add(seq)

    def fork(self, parent: int) -> int:
        """A second sequence with the same tokens; pages are shared until one of them is written."""
        seq = self[parent]
        for block in seq.blocks:
            self.pool.hold(block)
        return self._add(Sequence(list(seq.blocks), seq.length))

    def truncate(self, handle: int, length: int) -> None:
        """Forget all tokens from `length` on. Raises ValueError on a length out of range."""
        seq = self[handle]
        if not 0 <= length <= seq.length:
            raise ValueError(f"kv cache: truncate: expected 0..{seq.length} tokens, got {length}")
        keep = -(-length // self.Z)
        for block in seq.blocks[keep:]:
            self.pool.drop(block)
        del seq.blocks[keep:]
        seq.length = length

    def publish(self, handle: int, tokens: list[int]) -> None:
        """Let later sequences begin with this one's tokens, whose ids are `tokens`.

        The tree holds the pages from now on, until it is asked for room. Raises ValueError unless
        there is one id for each stored token.
        """
        seq = self[handle]
        if len(tokens) != seq.length:
            raise ValueError(
                f"kv cache: publish: expected ids of {seq.length} tokens, got {len(tokens)}"
            )
        self.tree.insert(tokens, seq.blocks)

    def free(self, handle: int) -> None:
        """Forget a sequence."""
        for block in self[handle].blocks:
            self.pool.drop(block)
        del self.sequences[handle]

    def grow(self, handles: list[int], counts: list[int]) -> Growth:
        """Room for `counts[i]` more tokens in sequence `handles[i]`, each named once.

        Raises:
            CacheFullError: not enough blocks, even with all that the prefix tree could give up.
            ValueError: a sequence named twice, or a negative count.
        """
        if len(set(handles)) != len(handles) or min(counts, default=0) < 0:
            raise ValueError("kv cache: grow: expected different sequences and counts >= 0")
        self.reserve(self.needed(handles, counts), sum(counts))
        slots: list[int] = []
        copies: list[tuple[int, int]] = []
        for handle, n in zip(handles, counts, strict=True):
            slots += self._extend(self[handle], n, copies)
        return Growth(slots, copies)

    def needed(self, handles: list[int], counts: list[int]) -> int:
        """Blocks that :meth:`grow` with these arguments takes at most."""
        return sum(self._blocks_to_grow(h, n) for h, n in zip(handles, counts, strict=True))

    def reserve(self, blocks: int, tokens: int) -> None:
        """Raise CacheFullError if so many blocks, wanted for so many tokens, cannot be had."""
        if blocks > self.pool.free and blocks > self.available:
            raise CacheFullError(
                f"kv cache: full: {tokens} tokens need {blocks} more pages of {self.Z}, "
                f"expected at most the {self.available} of {len(self.pool.holders)} that are free"
            )

    def clear(self) -> None:
        """Forget every sequence and every prefix."""
        for handle in list(self.sequences):
            self.free(handle)
        self.tree.clear()

    def __getitem__(self, handle: int) -> Sequence:
        if handle not in self.sequences:
            raise ValueError(f"kv cache: expected a live sequence, got {handle}")
        return self.sequences[handle]

    def _add(self, seq: Sequence) -> int:
        handle = self._next
        self._next += 1
        self.sequences[handle] = seq
        return handle

    def _blocks_to_grow(self, handle: int, n: int) -> int:
        """Blocks that appending n tokens takes, a copy of a shared last block included."""
        seq = self[handle]
        more = -(-(seq.length + n) // self.Z) - len(seq.blocks)
        return more + (n > 0 and self._must_copy(seq))

    def _must_copy(self, seq: Sequence) -> bool:
        """Whether the next token goes into a block that somebody else holds too."""
        return seq.length % self.Z != 0 and self.pool.holders[seq.blocks[-1]] > 1

    def _extend(self, seq: Sequence, n: int, copies: list[tuple[int, int]]) -> list[int]:
        if n and self._must_copy(seq):
            shared, own = seq.blocks[-1], self._take()
            copies.append((shared, own))
            seq.blocks[-1] = own
            self.pool.drop(shared)
        while len(seq.blocks) * self.Z < seq.length + n:
            seq.blocks.append(self._take())
        places = range(seq.length, seq.length + n)
        seq.length += n
        return [seq.blocks[i // self.Z] * self.Z + i % self.Z for i in places]

    def _take(self) -> int:
        if not self.pool.free:
            self.tree.evict()
        return self.pool.take()
