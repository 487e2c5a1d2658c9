"""What earlier prompts began with: a tree of blocks, found again token by token.

A node is a block with the ids of its tokens; a path from the root is a prefix. Only full blocks
have children. A new prompt follows full blocks as long as they agree, and then takes the block that
agrees longest with what is left, although it may hold other tokens behind that: the new sequence is
that much shorter, and copies the block when it writes into it (XY-Serve's token-wise reuse).

The tree holds its blocks. When the pool runs out it gives up leaves that nobody else holds, the one
that was used longest ago first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessella.kv.blocks import BlockPool


class _Node:
    __slots__ = ("block", "children", "parent", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], block: int, parent: _Node | None):
        self.tokens, self.block, self.parent = tokens, block, parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self.used = 0


class PrefixTree:
    """Prefixes over blocks of Z tokens."""

    def __init__(self, Z: int, pool: BlockPool):
        self.Z = Z
        self.pool = pool
        self._root = _Node((), -1, None)
        self._nodes: set[_Node] = set()
        self._clock = 0

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self._nodes)

    def blocks(self) -> list[int]:
        """Every block that the tree holds."""
        return [node.block for node in self._nodes]

    def match(self, tokens: list[int]) -> tuple[list[int], int]:
        """Blocks of the longest stored prefix of `tokens`, and its length."""
        node, blocks, done = self._root, [], 0
        while len(part := tuple(tokens[done : done + self.Z])) == self.Z:
            child = node.children.get(part)
            if child is None:
                break
            self._touch(child)
            blocks.append(child.block)
            node, done = child, done + self.Z
        best, common = None, 0
        for child in node.children.values():
            if (n := _common(child.tokens, part)) > common:
                best, common = child, n
        if best is not None:
            self._touch(best)
            blocks.append(best.block)
        return blocks, done + common

    def insert(self, tokens: list[int], blocks: list[int]) -> None:
        """Remember the blocks of a sequence; what the tree has already is left as it is."""
        node = self._root
        for i, block in enumerate(blocks):
            part = tuple(tokens[i * self.Z : (i + 1) * self.Z])
            if len(part) < self.Z and any(_common(c, part) == len(part) for c in node.children):
                return  # a block that says the same and more is there
            child = node.children.get(part)
            if child is None:
                child = _Node(part, block, node)
                node.children[part] = child
                self._nodes.add(child)
                self.pool.hold(block)
            self._touch(child)
            node = child

    def evictable(self) -> int:
        """Blocks that :meth:`evict` could give back, one after the other.

        A node that only the tree holds may still stand above one that a sequence holds; then it
        stays.
        """
        pinned: set[_Node] = set()
        for node in self._nodes:
            while node is not self._root and node not in pinned and self._in_use(node, pinned):
                pinned.add(node)
                node = node.parent
        return len(self._nodes) - len(pinned)

    def evict(self) -> None:
        """Give back the leaf used longest ago that nobody else holds; there must be one."""
        leaf = min(
            (n for n in self._nodes if not n.children and self.pool.holders[n.block] == 1),
            key=lambda n: n.used,
        )
        self._remove(leaf)

    def clear(self) -> None:
        """Give back every block."""
        for node in list(self._nodes):
            self.pool.drop(node.block)
        self._nodes.clear()
        self._root.children.clear()

    def _in_use(self, node: _Node, pinned: set[_Node]) -> bool:
        below = any(child in pinned for child in node.children.values())
        return below or self.pool.holders[node.block] > 1

    def _remove(self, node: _Node) -> None:
        del node.parent.children[node.tokens]
        self._nodes.discard(node)
        self.pool.drop(node.block)

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.used = self._clock


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two blocks have in common from their start."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
