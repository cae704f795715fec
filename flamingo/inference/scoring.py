"""Ranking of given answers: the log-probability of each candidate behind its prompt.

Every prompt is run once. The candidates form a trie, so that what several of them begin with is run once, and
the last token of a candidate is only read, never run: candidates of one token cost a look at one row of logits. The
whole trie is one forward pass in which a token attends to the prompt and to its own ancestors, where the LM takes such
a mask; elsewhere it goes level by level, one row for each node. A cache that the caller gave is not touched.

Letters: R rows (prompts), P tokens of the prompt, n candidates of a row, N inner nodes of a trie, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from flamingo.errors import UserError
from flamingo.inference.media_cache import ImageInputs, MediaCache, cached_length, check_counts
from flamingo.inference.prompts import (
    call_mask,
    check_length,
    check_rows,
    count_phi,
    inferred_mask,
    left_padded,
    token_phi,
)
from flamingo.inference.protocol import MediaModel
from flamingo.transfer import on_host, sent

BATCH = 64
"""Candidates of a row that are run together; the logits of their inner nodes, about as many times V, are in memory."""

Candidates = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]


@dataclass
class PromptState:
    """The prompts of a call, padded left and on the host, and what running them gave."""

    ids: Tensor
    mask: Tensor
    """(R, past + P), 0 for padding."""
    phi: Tensor
    media: MediaCache
    past: Cache | None
    logits: Tensor | None = None
    """(R, V) behind each prompt."""


def per_row_candidates(candidates: Candidates, rows: int) -> list[list[list[int]]]:
    """Return candidates as ids per row; one list for all rows is repeated.

    Raises:
        UserError: no candidates, an empty one, or lists that do not match the rows.
    """
    if not len(candidates):
        raise UserError("score_candidates needs at least one candidate")
    shared = not len(candidates[0]) or isinstance(candidates[0][0], int)
    listed: Any = [candidates] * rows if shared else candidates
    if len(listed) != rows or len({len(row) for row in listed}) != 1:
        raise UserError(f"candidates must be one list, or {rows} lists (one a row) of one length each")
    for row, options in enumerate(listed):
        for index, option in enumerate(options):
            if not len(option):
                raise UserError(f"candidate {index} of row {row} has no tokens")
    return [[list(option) for option in row] for row in listed]


@torch.no_grad()
def score_candidates(
    model: MediaModel,
    prompt_inputs: Mapping[str, Any],
    candidates: Candidates,
    *,
    batch_size: int = BATCH,
) -> Float[Tensor, "R n"]:
    """Return the log-probability of each candidate after its row's prompt, summed over the candidate's tokens.

    `prompt_inputs` as from the processor (or `media_features` instead of `pixel_values`), or a `past_key_values` with
    the tokens that follow it; `candidates` n lists of token ids shared by all rows, or one list of n lists a row.

    Raises:
        UserError: a score that is not finite; candidates that do not match the rows.
    """
    prompt = _prompt(model, prompt_inputs)
    options = per_row_candidates(candidates, len(prompt.ids))
    longest = max(len(option) for row in options for option in row)
    check_length(model, prompt.mask.shape[1], prompt.mask, longest, "tokens of a candidate")
    scores = torch.empty(len(options), len(options[0]))
    batches = list(_run(model, prompt, options, batch_size))
    for positions, tries, found in batches:
        for row, (chosen, trie) in enumerate(zip(positions, tries, strict=True)):
            scores[row, chosen] = _totals(trie, found[row])
    if not bool(scores.isfinite().all()):
        row, option = (~scores.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"the log-probability of candidate {option} in row {row} is not finite ({float(scores[row, option])}): "
            "look at the pixel values given, or compute in float32 or bfloat16 instead of float16"
        )
    assert prompt.logits is not None
    return sent(scores, prompt.logits.device)


def _run(
    model: MediaModel, prompt: PromptState, options: list[list[list[int]]], batch_size: int
) -> Iterator[tuple[list[list[int]], list[Trie], list[list[Found]]]]:
    """Run the prompts; yield, for each batch of candidates, which they are, each row's trie, and what was found of it.

    Nothing here waits for a device: all batches run before the first result is read.
    """
    out = model(
        input_ids=prompt.ids,
        attention_mask=prompt.mask,
        phi=prompt.phi,
        media_cache=prompt.media,
        past_key_values=prompt.past,
        use_cache=True,
        return_dict=True,
        logits_to_keep=1,
    )
    prompt.past, prompt.logits = out.past_key_values, out.logits[:, -1].float()
    # Sorted, so that candidates which begin alike are run together.
    orders = [sorted(range(len(row)), key=row.__getitem__) for row in options]
    for start in range(0, len(orders[0]), batch_size):
        positions = [order[start : start + batch_size] for order in orders]
        tries = [Trie.of([row[i] for i in chosen]) for row, chosen in zip(options, positions, strict=True)]
        behind = _by_tree if takes_tree(model, prompt.past) else _by_levels
        found = behind(model, prompt, tries) if any(trie.inner for trie in tries) else [[] for _ in tries]
        for row, trie in enumerate(tries):
            roots = [node for node, parent in enumerate(trie.parents) if parent < 0]
            found[row].append(_found(prompt.logits[row : row + 1], [(node, 0, trie.tokens[node]) for node in roots]))
        yield positions, tries, found


def _prompt(model: MediaModel, inputs: Mapping[str, Any]) -> PromptState:
    """Read the caller's inputs; his cache and what it remembers of images are branched, not used."""
    past = inputs.get("past_key_values")
    ids: Any = inputs["input_ids"]
    mask: Any = inputs.get("attention_mask")
    phi: Any = inputs.get("phi")
    ids, mask, phi = (on_host(x) if isinstance(x, Tensor) else x for x in (ids, mask, phi))
    images = ImageInputs(**{name: inputs.get(name) for name in ImageInputs._fields})
    media = model.media_of(len(ids), inputs.get("media_cache"), past, images).hosted().branch()
    before = cached_length(past)
    check_rows(ids, None)
    if phi is None:
        seen = media.seen if before else None
        seen = None if seen is None else on_host(seen)
        phi = count_phi(model.config, ids, seen=seen)
        check_counts(phi, media, seen)
    mask = inferred_mask(model, ids) if mask is None and not before else call_mask(model, ids, mask, media, past)
    if mask is None:
        mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long, device=ids.device)
    check_rows(ids, mask[:, before:])
    if not before:
        ids, mask, phi = left_padded(ids, mask, phi)
    elif not bool(mask[:, -1].all()):
        raise UserError("rows that are padded on the right cannot go on from a cache; pad them on the left")
    return PromptState(ids, mask, phi, media, None if past is None else _branch(past))


def _branch(cache: Cache) -> Cache:
    """Return a cache that can be continued while the given one stays as it is."""
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return copy.deepcopy(cache)
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]  # these grow by making new tensors
    return out


Found = tuple[tuple[int, ...], Tensor]
"""Nodes of a trie, and the log-probability of each where the model ran."""


def _totals(trie: Trie, found: list[Found]) -> Tensor:
    """Return the scores of a trie's candidates, from what was found of its nodes."""
    by_node = {node: value for nodes, values in found for node, value in zip(nodes, values.tolist(), strict=True)}
    totals: list[float] = []
    for node, parent in enumerate(trie.parents):
        totals.append(by_node[node] + (totals[parent] if parent >= 0 else 0.0))
    return torch.tensor([totals[end] for end in trie.ends])


def _found(logits: Float[Tensor, "N V"], wanted: list[tuple[int, int, int]]) -> Found:
    """Return each node's log-probability, for triples of node, position of its logits, and token."""
    nodes, positions, tokens = zip(*wanted, strict=True) if wanted else ((), (), ())
    logits = logits.float()
    where, chosen = (sent(torch.tensor(x, dtype=torch.long), logits.device) for x in (positions, tokens))
    return nodes, logits[where, chosen] - logits.logsumexp(-1)[where]


def takes_tree(model: MediaModel, cache: Cache | None) -> bool:
    """Say whether the LM runs a whole trie at once: it takes a mask of its own making, and positions.

    Not so with ALiBi, local attention, and caches that forget; nor with a class that is not known to pass such a mask
    through unchanged, as those that build theirs with transformers' `create_causal_mask` do.
    """
    lm = model.language_model
    config: Any = lm.config.get_text_config(decoder=True)
    return (
        model.lm_takes_positions
        and cache is not None
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(config, "alibi", False)
        and "local" not in getattr(config, "attention_layers", ())
        and hasattr(sys.modules[type(lm).__module__], "create_causal_mask")
    )


def _by_tree(model: MediaModel, prompt: PromptState, tries: list[Trie]) -> list[list[Found]]:
    """Run all inner nodes of a row as one sequence in which each attends to the prompt, its ancestors and itself."""
    rows, width = len(tries), max(len(trie.inner) for trie in tries)
    ids = torch.zeros(rows, width, dtype=torch.long)
    depths = torch.zeros_like(ids)
    related = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)
    positions = [{node: position for position, node in enumerate(trie.inner)} for trie in tries]
    for row, trie in enumerate(tries):
        for node, position in positions[row].items():
            ids[row, position], depths[row, position] = trie.tokens[node], trie.depths[node]
            related[row, position, [positions[row][other] for other in trie.path(node)]] = True
    mask = prompt.mask.bool()
    seen = torch.cat([mask[:, None].expand(-1, width, -1), related], dim=-1)[:, None]
    config: Any = model.language_model.config.get_text_config(decoder=True)
    if config._attn_implementation == "eager":  # adds the mask to its scores
        dtype = model.language_model.dtype
        seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    assert prompt.past is not None
    out = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=mask.sum(1, keepdim=True) + depths,
        phi=prompt.phi[:, -1:].expand(-1, width),
        media_cache=prompt.media.branch(),
        past_key_values=_branch(prompt.past),
        use_cache=True,
        return_dict=True,
    )
    return [
        [_found(out.logits[row], [(n, positions[row][p], t) for n, (p, t) in enumerate(trie.edges()) if p >= 0])]
        for row, trie in enumerate(tries)
    ]


def _by_levels(model: MediaModel, prompt: PromptState, tries: list[Trie]) -> list[list[Found]]:
    """Run the inner nodes of one depth after the other, each as a row with a copy of its parent's cache."""
    found: list[list[Found]] = [[] for _ in tries]
    position = {(row, -1): row for row in range(len(tries))}
    cache, depth = prompt.past, 0
    while level := [(row, node) for row, trie in enumerate(tries) for node in trie.inner if trie.depths[node] == depth]:
        assert cache is not None
        assert prompt.logits is not None
        parents = torch.tensor([position[row, tries[row].parents[node]] for row, node in level])
        rows = torch.tensor([row for row, _ in level])
        cache = _branch(cache)
        cache.reorder_cache(sent(parents, prompt.logits.device))  # type: ignore[arg-type]  # any index of rows
        depth += 1
        logits = model(
            input_ids=prompt.ids.new_tensor([[tries[row].tokens[node]] for row, node in level]),
            attention_mask=torch.cat([prompt.mask[rows], prompt.mask.new_ones(len(level), depth)], dim=1),
            phi=prompt.phi[rows, -1:],
            media_cache=prompt.media.branch(rows),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits[:, -1]
        position = {key: slot for slot, key in enumerate(level)}
        for slot, (row, node) in enumerate(level):
            children = [(n, 0, t) for n, (p, t) in enumerate(tries[row].edges()) if p == node]
            found[row].append(_found(logits[slot : slot + 1], children))
    return found


@torch.no_grad()
def score_candidates_slow(
    model: MediaModel, prompt_inputs: Mapping[str, Any], candidates: Candidates
) -> Float[Tensor, "R n"]:
    """The twin of `score_candidates` for tests: each prompt is run anew with each candidate, without any cache."""
    prompt = _prompt(model, {name: value for name, value in prompt_inputs.items() if name != "past_key_values"})
    scores = []
    for row, options in enumerate(per_row_candidates(candidates, len(prompt.ids))):
        for option in options:
            ids = torch.cat([prompt.ids[row], prompt.ids.new_tensor(option)])[None]
            logits = model(
                input_ids=ids,
                attention_mask=torch.cat([prompt.mask[row], prompt.mask.new_ones(len(option))])[None],
                phi=token_phi(prompt.phi[row : row + 1], ids.shape[1]),
                media_cache=prompt.media.branch(torch.tensor([row])),
                use_cache=False,
                return_dict=True,
            ).logits[0, -len(option) - 1 : -1]
            scores.append(logits.float().log_softmax(-1).gather(1, ids[0, -len(option) :, None]).sum())
    return torch.stack(scores).view(len(prompt.ids), -1)


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
