import itertools

import plain_metrics as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from harmony.evaluation import ranking
from harmony.evaluation.ranking import best_ranks, chance_recall, median, recall


@given(st.data())
def test_ranks_are_those_of_the_definition(data):
    queries, candidates = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    right = [data.draw(st.sets(st.integers(0, candidates - 1), min_size=1)) for _ in range(queries)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    # A coarse grid of values, so that ties are frequent.
    q = torch.randint(-1, 2, (queries, 3), generator=generator) / 4
    c = torch.randint(-1, 2, (candidates, 3), generator=generator) / 4
    own = torch.tensor([(i, j) for i, js in enumerate(right) for j in js])[torch.randperm(sum(map(len, right)))]
    ranks = best_ranks(q, c, (own[:, 0], own[:, 1]))
    assert ranks.tolist() == [plain.rank(q[i], list(c), right[i]) for i in range(queries)]


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, c = plain.unit(torch.randn(70, 8, generator=generator)), plain.unit(torch.randn(90, 8, generator=generator))
    own = (torch.arange(70).repeat(2), torch.cat([torch.randperm(90)[:70], torch.randperm(90)[:70]]))
    copies = torch.randint(1, 4, (90,), generator=generator)
    whole = best_ranks(q, c, own, copies)
    monkeypatch.setattr(ranking, "QUERIES", 11)
    monkeypatch.setattr(ranking, "CANDIDATES", 7)
    assert best_ranks(q, c, own, copies).equal(whole)


def test_copies_count_as_often_as_they_occur():
    q, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
    own = (torch.tensor([0]), torch.tensor([2]))
    assert best_ranks(q, c, own, torch.tensor([3, 4, 1])).tolist() == [8]
    spelled_out = c[[0, 0, 0, 1, 1, 1, 1, 2]]
    assert best_ranks(q, spelled_out, (torch.tensor([0]), torch.tensor([7]))).tolist() == [8]


def test_a_constant_embedding_scores_nothing():
    same = plain.unit(torch.ones(50, 7))
    noisy = plain.unit(same + 1e-8 * torch.randn(50, 7))
    own = (torch.arange(50), torch.arange(50))
    for embeddings in (same, noisy):
        assert best_ranks(embeddings, embeddings, own).tolist() == [50] * 50


def test_what_is_not_a_number_counts_against():
    q, c = torch.eye(3), torch.eye(3)
    own = (torch.arange(3), torch.arange(3))
    c[1] = float("nan")  # wrong for queries 0 and 2, and the right answer of query 1
    assert best_ranks(q, c, own).tolist() == [2, 3, 2]


@pytest.mark.parametrize("pool", [1, 2, 5, 7])
def test_chance_of_a_random_order(pool):
    for k, right in itertools.product((1, 3, 5), range(1, pool + 1)):
        lists = list(itertools.combinations(range(pool), min(k, pool)))
        found = sum(1 for chosen in lists if any(i < right for i in chosen)) / len(lists)
        assert chance_recall(torch.tensor([right]), pool, k) == pytest.approx(found)


def test_chance_averages_over_queries():
    right = torch.tensor([1, 5, 5, 2])
    expected = sum(plain.chance_recall(r, 60, 10) for r in right.tolist()) / 4
    assert chance_recall(right, 60, 10) == pytest.approx(expected)


def test_random_embeddings_score_chance():
    generator = torch.Generator().manual_seed(3)
    q, c = plain.unit(torch.randn(4000, 16, generator=generator)), plain.unit(torch.randn(100, 16, generator=generator))
    ranks = best_ranks(q, c, (torch.arange(4000), torch.arange(4000) % 100))
    for k in (1, 5, 10):
        spread = (k / 100 * (1 - k / 100) / 4000) ** 0.5
        assert abs(recall(ranks, k) - k / 100) < 4 * spread


def test_recall_and_median():
    ranks = torch.tensor([1, 2, 2, 9])
    assert [recall(ranks, k) for k in (1, 2, 8, 9)] == [0.25, 0.75, 0.75, 1.0]
    assert median(ranks) == 2
    assert median(torch.tensor([1, 2, 5, 9])) == 3.5


def test_the_whole_matrix_is_never_held():
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    q, c = torch.randn(5000, 2), torch.randn(20_000, 2)
    with Watching():
        best_ranks(q, c, (torch.arange(5000), torch.arange(5000)))
    assert 20_000 < largest <= ranking.QUERIES * ranking.CANDIDATES < 5000 * 20_000
