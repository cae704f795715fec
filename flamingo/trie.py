"""Candidate answers as a trie: what several of them begin with is one path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Trie:
    """Candidates of one row. Node -1 is the prompt; every other node is a token behind its parent, parents first."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """0 for a first token."""
    ends: list[int] = field(default_factory=list)
    """Of each candidate the node of its last token."""
    inner: list[int] = field(default_factory=list)
    """Nodes that others follow: the ones that the LM has to run."""

    @classmethod
    def of(cls, options: Sequence[Sequence[int]]) -> Trie:
        """Build the trie: [[5] [5 6] [5 7 8]] gives tokens [5 6 7 8], parents [-1 0 0 2], inner [0 2], ends [0 1 3]."""
        trie = cls()
        known: dict[tuple[int, int], int] = {}
        for option in options:
            node = -1
            for depth, token in enumerate(option):
                key = (node, token)
                if key not in known:
                    known[key] = len(trie.tokens)
                    trie.tokens.append(token)
                    trie.parents.append(node)
                    trie.depths.append(depth)
                node = known[key]
            trie.ends.append(node)
        trie.inner = sorted(set(trie.parents) - {-1})
        return trie

    def path(self, node: int) -> list[int]:
        """Return a node and its ancestors."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out

    def edges(self) -> list[tuple[int, int]]:
        """Return each node's parent and token."""
        return list(zip(self.parents, self.tokens, strict=True))
