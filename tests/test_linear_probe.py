"""The solver of linear probes: at its optimum, the same as others find it, alone or among many."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.data import Dataset
from fastsitch.errors import NetworkError
from fastsitch.identity import torch_generator
from fastsitch.networks.linear_probe import STRENGTHS, LinearProbe, Regression, fit_probes

IMAGES, CLASSES = 600, 10


@pytest.fixture(scope="module")
def labels(fashion: Dataset) -> Tensor:
    return fashion.train.labels[:IMAGES]


@pytest.fixture(scope="module")
def features(fashion: Dataset) -> Tensor:
    """Two sets of 49 features of real images: means over patches, and random mixtures of them on other scales."""
    pixels = fashion.train.images[:IMAGES, 2:30, 2:30, 0].double() / 255
    patches = pixels.unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1)
    mixture = torch.randn(49, 49, generator=torch_generator("mixture"), dtype=torch.float64)
    return torch.stack([patches, torch.tanh(patches @ mixture) * torch.logspace(-2, 2, 49, dtype=torch.float64) + 3])


def standardised(x: Tensor) -> Tensor:
    """Corners of images are black in all of them."""
    return (x - x.mean(0)) / x.std(0, unbiased=False).clamp_min(1e-12)


def loss(weight: Tensor, bias: Tensor, z: Tensor, labels: Tensor, strength: float) -> Tensor:
    """As it is defined, of standardised features."""
    return F.cross_entropy(z @ weight.T + bias, labels) + strength / 2 * weight.square().sum()


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_the_gradient_at_the_end_is_zero(features: Tensor, labels: Tensor, strength: float) -> None:
    problem = Regression(features, labels, CLASSES)
    strengths = torch.full((2, 1), strength, dtype=torch.float64)
    weights, biases = problem.folded(problem.solve(strengths))
    for x, weight_DSC, bias_SC in zip(features, weights, biases, strict=True):
        weight, bias = weight_DSC[:, 0].T * x.std(0, unbiased=False), bias_SC[0] + x.mean(0) @ weight_DSC[:, 0]
        variables = weight.requires_grad_(), bias.requires_grad_()
        value = loss(*variables, standardised(x), labels, strength)
        by_weight, by_bias = torch.autograd.grad(value, variables)
        assert by_weight.norm() < 1e-6
        assert by_bias.norm() < 1e-6
        assert value < 2.2


def test_the_solution_is_that_of_another_solver(features: Tensor, labels: Tensor) -> None:
    strength = 1e-2
    problem = Regression(features[:1], labels, CLASSES)
    weights, biases = problem.folded(problem.solve(torch.tensor([[strength]], dtype=torch.float64), 1e-9))
    x, z = features[0], standardised(features[0])
    weight = torch.zeros(CLASSES, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(weight, bias, z, labels, strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    optimizer.step(closure)
    theirs = F.log_softmax(z @ weight.T + bias, -1)
    ours = F.log_softmax(x @ weights[0, :, 0] + biases[0, 0], -1)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert torch.allclose(weights[0, :, 0].T * x.std(0, unbiased=False), weight, rtol=1e-4, atol=1e-5)


def test_of_two_classes_the_solution_is_that_of_newtons_method(features: Tensor, labels: Tensor) -> None:
    few = labels < 2
    x, y, strength = features[0, few], labels[few], 0.1
    problem = Regression(x[None], y, 2)
    weights, biases = problem.folded(problem.solve(torch.tensor([[strength]], dtype=torch.float64)))
    difference = weights[0, :, 0] @ torch.tensor([-1.0, 1.0], dtype=torch.float64)
    shift = biases[0, 0, 1] - biases[0, 0, 0]
    # two symmetric columns of weights are one of twice their size, of half the penalty
    mean, std = x.mean(0), x.std(0, unbiased=False)
    z = torch.cat([(x - mean) / std.clamp_min(1e-12), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    penalty = torch.full((z.shape[1],), strength / 2, dtype=torch.float64)
    penalty[-1] = 0
    w = torch.zeros(z.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(z @ w)
        gradient = z.T @ (p - y) / len(y) + penalty * w
        hessian = (z.T * (p * (1 - p))) @ z / len(y) + torch.diag(penalty)
        w = w - torch.linalg.solve(hessian, gradient)
    assert torch.allclose(x @ difference + shift, z @ w, atol=1e-6)


def test_a_probe_alone_is_that_among_others(features: Tensor, labels: Tensor) -> None:
    together = fit_probes(features, labels, CLASSES)
    for x, probe in zip(features, together, strict=True):
        (alone,) = fit_probes(x[None], labels, CLASSES)
        assert alone.strength == probe.strength
        assert torch.allclose(alone.weight, probe.weight, rtol=1e-5, atol=1e-6)
        assert alone.train_accuracy == probe.train_accuracy


def right(probe: LinearProbe, x: Tensor, labels: Tensor) -> int:
    return int((probe.logits(x).argmax(1) == labels).sum())


def test_the_strength_is_the_best_on_images_that_were_held_out(
    features: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = features[:1].float()
    (probe,) = fit_probes(x, labels, CLASSES)
    order = torch.randperm(IMAGES, generator=torch_generator("probe", IMAGES))
    held, kept = order[: IMAGES // 5], order[IMAGES // 5 :]
    scores = {}
    for strength in STRENGTHS:
        # one strength leaves no choice
        monkeypatch.setattr("fastsitch.networks.linear_probe.STRENGTHS", (strength,))
        (one,) = fit_probes(x[:, kept], labels[kept], CLASSES)
        scores[strength] = F.cross_entropy(one.logits(x[0, held]), labels[held]).item()
    best = min(STRENGTHS, key=scores.__getitem__)
    assert probe.strength == best
    assert STRENGTHS[0] < best < STRENGTHS[-1]
    monkeypatch.setattr("fastsitch.networks.linear_probe.STRENGTHS", (best,))
    (again,) = fit_probes(x, labels, CLASSES)
    assert torch.equal(again.weight, probe.weight)
    assert probe.images == IMAGES
    assert probe.train_accuracy == right(probe, x[0], labels) / IMAGES
    assert probe.train_accuracy > 0.7


def test_constant_repeated_and_too_many_features(features: Tensor, labels: Tensor) -> None:
    x = features[0, :40]
    wide = torch.cat([x, torch.full((40, 1), 7.25, dtype=torch.float64), x, x * 2 + 1], 1)
    (probe,) = fit_probes(wide[None], labels[:40], CLASSES)
    assert probe.weight.isfinite().all()
    assert not probe.weight[:, 49].any()
    # the same feature has the same share
    assert torch.allclose(probe.weight[:, :49], probe.weight[:, 50:99], atol=1e-6)
    assert torch.allclose(probe.weight[:, :49], probe.weight[:, 99:] * 2, atol=1e-6)


def test_in_parts_it_is_the_same(features: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_probes(features, labels, CLASSES)
    monkeypatch.setattr("fastsitch.networks.linear_probe._MOST_LOGITS", 10_000)
    for one, other in zip(whole, fit_probes(features, labels, CLASSES), strict=True):
        assert one.strength == other.strength
        assert torch.allclose(one.weight, other.weight, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_probed_is_refused(features: Tensor, labels: Tensor) -> None:
    broken = features.clone()
    broken[1, 5, 3] = float("nan")
    with pytest.raises(NetworkError, match="not finite: expected usable weights"):
        fit_probes(broken, labels, CLASSES)
    with pytest.raises(NetworkError, match="expected at least two"):
        fit_probes(features[:, :1], labels[:1], CLASSES)


def test_classes_without_images_are_never_said(features: Tensor, labels: Tensor) -> None:
    (probe,) = fit_probes(features[:1], labels, CLASSES + 2)
    said = set(itertools.chain(probe.logits(features[0]).argmax(1).tolist()))
    assert said <= set(range(CLASSES))
