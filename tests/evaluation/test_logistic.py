import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from harmony.evaluation import logistic
from harmony.evaluation.logistic import Problem, statistics


def blobs(count=300, width=12, classes=4, spread=1.5, seed=0):
    """Overlapping classes, features nearly dependent and of very different sizes, as encoders give them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    inputs = centres[labels] + spread * torch.randn(count, width, generator=generator, dtype=torch.float64)
    inputs[:, 1] = inputs[:, 0] + 1e-3 * inputs[:, 1]
    return inputs * torch.logspace(-3, 3, width, dtype=torch.float64) + 5, labels


def scikit(inputs, labels, regularisation):
    scaler = StandardScaler().fit(inputs.numpy())
    strength = 1 / (regularisation * len(inputs))
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=20000)
    return scaler, model.fit(scaler.transform(inputs.numpy()), labels.numpy())


@pytest.mark.parametrize("regularisation", [10.0, 0.1, 1e-3])
def test_the_solution_is_scikit_learns(regularisation):
    inputs, labels = blobs()
    ours = Problem(inputs, labels, 4).solve(regularisation, tolerance=1e-9)
    scaler, theirs = scikit(inputs, labels, regularisation)
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-4)
    bias = ours.bias.numpy()
    # A constant added to all biases changes nothing, so only differences are determined.
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    fresh, _ = blobs(seed=1)
    probabilities = F.softmax(ours.scores(fresh), dim=1).numpy()
    np.testing.assert_allclose(probabilities, theirs.predict_proba(scaler.transform(fresh.numpy())), atol=1e-4)


def plain_gradient(inputs, labels, weight, bias, regularisation):
    """Of the objective as it is defined, by automatic differentiation."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = F.cross_entropy(inputs @ weight.T + bias, labels) + regularisation / 2 * weight.square().sum()
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, [weight, bias])])


@pytest.mark.parametrize("shape", [(300, 12), (30, 80)])  # more images than features, and fewer
@pytest.mark.parametrize("regularisation", [1.0, 1e-2, 1e-5])
def test_the_gradient_vanishes_at_the_solution(shape, regularisation):
    inputs, labels = blobs(*shape)
    solution = Problem(inputs, labels, 4).solve(regularisation, tolerance=1e-6)
    standardised = (inputs - solution.mean) / solution.scale
    _, gradient = plain_gradient(standardised, labels, solution.weight, solution.bias, regularisation)
    assert gradient.abs().max() < 2e-6
    assert solution.gradient <= 1e-6
    assert solution.steps < 300


def test_the_path_does_not_change_where_it_leads():
    inputs, labels = blobs()
    problem = Problem(inputs, labels, 4)
    along = [problem.solve(strength, 1e-9) for strength in (10.0, 1.0, 0.1, 0.01)][-1]
    alone = Problem(inputs, labels, 4).solve(0.01, 1e-9)
    torch.testing.assert_close(along.weight, alone.weight, atol=1e-6, rtol=0)


def test_the_objective_does_not_remember_another_regularisation_or_other_weights():
    inputs, labels = blobs()
    problem = Problem(inputs, labels, 4)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 13, generator=generator, dtype=torch.float64)
    for weights, strength in ((first, 0.1), (first, 10.0), (second, 10.0), (first, 0.1)):
        loss, gradient = problem.objective(weights, strength)
        expected = Problem(inputs, labels, 4).objective(weights, strength)
        assert loss.equal(expected[0]) and gradient.equal(expected[1])
        gradient.zero_()  # the caller's own


def test_where_a_fit_ended_is_not_computed_anew(monkeypatch):
    passes, softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda *given, **named: passes.append(1) or softmax(*given, **named))
    inputs, labels = blobs()
    problem = Problem(inputs.float(), labels, 4)
    problem.solve(0.1)
    before = len(passes)
    assert problem.solve(0.1).steps == 0
    assert len(passes) == before


def test_single_precision_finds_the_same_probabilities():
    inputs, labels = blobs()
    exact, quick = Problem(inputs, labels, 4).solve(1e-3, 1e-9), Problem(inputs.float(), labels, 4).solve(1e-3)
    probabilities = [F.softmax(c.scores(inputs).double(), dim=1) for c in (exact, quick)]
    torch.testing.assert_close(*probabilities, atol=2e-3, rtol=0)


def test_pieces_change_nothing(monkeypatch):
    inputs, labels = blobs()
    whole = Problem(inputs, labels, 4).solve(0.1, 1e-9)
    monkeypatch.setattr(logistic, "ROWS", 37)
    pieces = Problem(inputs, labels, 4).solve(0.1, 1e-9)
    torch.testing.assert_close(pieces.weight, whole.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(pieces.scores(inputs), whole.scores(inputs), atol=1e-5, rtol=0)


def test_classes_that_were_never_seen_are_never_predicted():
    inputs, labels = blobs()
    solution = Problem(inputs, labels * 2, 9).solve(0.1, 1e-9)
    scores = solution.scores(inputs)
    assert scores[:, 1::2].eq(-torch.inf).all()
    assert scores[:, 8].eq(-torch.inf).all()
    assert scores[:, :8:2].isfinite().all()
    torch.testing.assert_close(scores[:, :8:2], Problem(inputs, labels, 4).solve(0.1, 1e-9).scores(inputs))


def test_what_is_the_same_in_all_images_is_of_no_weight():
    inputs, labels = blobs()
    inputs[:, 3] = 1e4 / 3
    mean, scale = statistics(inputs.float())
    assert scale[3] == 1
    assert (inputs.float()[:, 3] - mean[3]).abs().max() == 0
    solution = Problem(inputs, labels, 4).solve(0.1)
    assert solution.weight[:, 3].abs().max() < 1e-12
    others = [i for i in range(12) if i != 3]
    torch.testing.assert_close(scale[others].double(), inputs[:, others].std(dim=0, correction=0), rtol=1e-4, atol=0)


def test_raw_weights_score_features_as_they_are():
    inputs, labels = blobs()
    solution = Problem(inputs, labels, 4).solve(0.1)
    by_hand = ((inputs - solution.mean) / solution.scale) @ solution.weight.T + solution.bias
    weight, bias = solution.raw()
    torch.testing.assert_close(inputs @ weight.T + bias, by_hand)
    torch.testing.assert_close(solution.scores(inputs), by_hand)
