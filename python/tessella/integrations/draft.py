"""Drafts from the text itself: what followed the same last tokens before.

Prompt lookup: where the last n tokens have stood earlier, what came after them may come again.
Continuations of several such places are merged into a tree, so that one step verifies all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LONGEST = 4
"""Tokens that are looked up at most; a longer match is tried first."""


@dataclass
class Tree:
    """Nodes in order of their making: node 0 is the last token of the text, drafts follow it."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, chain: list[int], most: int) -> None:
        """Graft a continuation of node 0 on, sharing the nodes that are there already."""
        node = 0
        for token in chain:
            child = self.child(node, token)
            if child is None:
                if len(self) >= most:
                    return
                child = len(self)
                self.tokens.append(token)
                self.parents.append(node)
            node = child

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that holds `token`."""
        for i in range(node + 1, len(self)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def depths(self) -> list[int]:
        """Distance of each node from node 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    def seen(self) -> Tensor:
        """bool [n, n]: each node sees its ancestors and itself."""
        n = len(self)
        seen = torch.eye(n, dtype=torch.bool)
        for i in range(1, n):
            seen[i] |= seen[self.parents[i]]
        return seen

    def accept(self, predicted: list[int]) -> tuple[list[int], int]:
        """(nodes that greedy decoding takes, the token after them); `predicted[i]` follows node i.

        A node is taken if its parent is and predicts it, so the result is what decoding one token
        at a time would have given.
        """
        path = [0]
        while (child := self.child(path[-1], predicted[path[-1]])) is not None:
            path.append(child)
        return path, predicted[path[-1]]


def draft(tokens: list[int], most: int) -> Tree:
    """A tree of up to `most` drafted tokens behind the last one of a text."""
    tree = Tree([tokens[-1]])
    for n in range(min(LONGEST, len(tokens) - 1), 0, -1):
        key = tokens[-n:]
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tree) > most:
                return tree
            if tokens[end - 1] == key[-1] and tokens[end - n : end] == key:
                tree.add(tokens[end : end + most], most + 1)
    return tree
