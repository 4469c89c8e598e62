"""The rank of the right answer, which is all that recall and top-k accuracy need.

A rank counts what stands before the right answer, so it is exact for any k at once and needs no sorted list. Everything
runs on blocks of the similarity matrix: 100,000 images against 500,000 captions need some 150 MB beside the embeddings.
Shapes: Q queries, K candidates, E shared width, P pairs of a query and a candidate that is right for it.
"""

import torch
from torch import Tensor

TIE = 1e-6
"""Cosine similarities closer than this are a tie: a few units of float32 rounding in a sum of some hundred products."""

QUERIES, CANDIDATES = 2048, 8192
"""Sides of the block of similarities that is held at a time (64 MiB in float32)."""


def best_ranks(
    queries: Tensor,
    candidates: Tensor,
    own: tuple[Tensor, Tensor],
    copies: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The rank of each query's most similar right answer among the right answer and all wrong ones; 1 is best.

    Ties count against: a wrong candidate that is as similar as the right one stands before it, so that an encoder which
    gives everything the same embedding scores nothing. So do similarities that are not numbers.

    Args:
        queries: (Q, E) float, of unit length.
        candidates: (K, E) float, of unit length.
        own: (P,) and (P,) int64, the query and the candidate of each right pair, every query at least once.
        copies: (K,) how many candidates each one stands for; 1 when left out.
        device: where the similarities are computed.

    Returns:
        (Q,) int64.
    """
    order = own[0].argsort(stable=True)
    own_queries, own_candidates = own[0][order], own[1][order]
    thresholds = _best_own(queries, candidates, own_queries, own_candidates) - TIE
    weights = torch.ones(len(candidates)) if copies is None else copies.to(torch.float32)
    before = torch.zeros(len(queries), dtype=torch.int64)
    for top in range(0, len(queries), QUERIES):
        rows = slice(top, top + QUERIES)
        block = queries[rows].to(device)
        pairs = (own_queries >= top) & (own_queries < top + QUERIES)
        row, column = own_queries[pairs] - top, own_candidates[pairs]
        for left in range(0, len(candidates), CANDIDATES):
            similarity = block @ candidates[left : left + CANDIDATES].to(device).T
            # "Not less" instead of "at least", so that a NaN stands before the right answer instead of behind it.
            stands_before = ~(similarity < thresholds[rows, None].to(device))
            here = (column >= left) & (column < left + CANDIDATES)
            stands_before[row[here].to(device), column[here].to(device) - left] = False
            counted = stands_before.to(torch.float32) @ weights[left : left + CANDIDATES].to(device)
            before[rows] += counted.round().to(torch.int64).cpu()
    return before + 1


def _best_own(queries: Tensor, candidates: Tensor, own_queries: Tensor, own_candidates: Tensor) -> Tensor:
    """(Q,), the highest similarity of each query to an answer that is right for it."""
    similarity = torch.cat(
        [
            (queries[q] * candidates[c]).sum(dim=1)
            for q, c in zip(own_queries.split(65536), own_candidates.split(65536), strict=True)
        ]
    )
    best = torch.full((len(queries),), float("-inf"), dtype=similarity.dtype)
    return best.scatter_reduce(0, own_queries, similarity, "amax")


def recall(ranks: Tensor, k: int) -> float:
    """Share of the queries whose right answer is among the first k."""
    return (ranks <= k).double().mean().item()


def median(ranks: Tensor) -> float:
    """The middle rank, or the mean of the two middle ones."""
    return ranks.double().quantile(0.5).item() if len(ranks) < 2**24 else float(ranks.median())


def chance_recall(right: Tensor, pool: int, k: int) -> float:
    """Expected recall at k of a random order of `pool` candidates of which right[q] are right for query q.

    One minus the chance that none of the k is right, C(pool - right, k) / C(pool, k), averaged over the queries.

    Args:
        right: (Q,) int64, from 1 to `pool`.
        pool: number of candidates.
        k: length of the list that is looked at.
    """
    if k >= pool:
        return 1.0
    counts, queries = right.unique(return_counts=True)
    missed = torch.ones(len(counts), dtype=torch.float64)
    for i in range(k):
        missed *= ((pool - counts - i).clamp(min=0)).double() / (pool - i)
    return 1 - (missed * queries).sum().item() / len(right)
