"""Linear probes: multinomial logistic regression with L2 regularisation, many problems at once, each to its optimum.

Shapes: P sets of features of one width D for the same N images, S strengths, C classes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.errors import NetworkError
from fastsitch.identity import torch_generator

log = logging.getLogger(__name__)

STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 1))
"""What is tried: the loss is the mean cross-entropy plus half the strength times the sum of squared weights."""

_HELD_OUT = 0.2
"""The share of the training images on which strengths are compared."""

_TOLERANCE = 1e-7
"""Of every number in the gradient at the end."""

_TRIAL_TOLERANCE = 1e-4
"""The same, where strengths are compared."""

_MOST_STEPS = 5000

_MEMORY = 12
"""Steps that the approximation of the Hessian is made of."""

_MOST_LOGITS = 1 << 25
"""Logits that are in memory at once."""

_CONSTANT = 1e-6
"""A feature that varies by less than this share of its mean is taken for a constant, which predicts nothing."""

_ROUNDING = 1e-12
"""Of the largest variance along an axis."""


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear layer on features, and how it was found."""

    weight: Tensor
    """fp64 (classes, features), on the features as they are: standardisation is folded in."""
    bias: Tensor
    """fp64 (classes,)"""
    strength: float
    """Of the regularisation, of the standardised features; see STRENGTHS."""
    train_accuracy: float
    images: int
    """It was fitted on."""

    def logits(self, features: Tensor) -> Tensor:
        """fp64 (N, classes) for features (N, D) on any device."""
        return F.linear(features.double(), self.weight.to(features.device), self.bias.to(features.device))

    def to_dict(self) -> dict[str, float | int]:
        """What records keep of it."""
        return {"strength": self.strength, "train_accuracy": self.train_accuracy, "images": self.images}


@torch.no_grad()
def fit_probes(features_PND: Tensor, labels: Tensor, classes: int) -> list[LinearProbe]:
    """Fit a probe to each of P sets of features (P, N, D) of images with these labels (N,); all on one device.

    All strengths are fitted on four fifths of the images at once. The one with the lowest cross-entropy on the others,
    which varies less than their accuracy, is taken for a fit on all images. Raises NetworkError for features that are
    not finite and for fewer than two images.
    """
    count = len(labels)
    if count < 2:
        raise NetworkError(f"a probe of {count} training images: expected at least two")
    if not features_PND.isfinite().all():
        raise NetworkError("a probe of features that are not finite: expected usable weights")
    features = features_PND.double()
    order = torch.randperm(count, generator=torch_generator("probe", count)).to(labels.device)
    held, kept = order.tensor_split([max(1, round(_HELD_OUT * count))])
    # half the time, and as exact as is needed here
    trial = Regression(features[:, kept], labels[kept], classes, torch.float32)
    tried = labels.new_tensor(STRENGTHS, dtype=torch.float64).expand(len(features), -1)
    weight_PDSC, bias_PSC = trial.folded(trial.solve(tried, _TRIAL_TOLERANCE))
    logits = torch.einsum("pnd,pdsc->psnc", features[:, held], weight_PDSC) + bias_PSC[:, :, None]
    index = labels[held].view(1, 1, -1, 1).expand(*logits.shape[:3], 1)
    best = logits.log_softmax(-1).gather(-1, index).sum((2, 3)).argmax(1)
    chosen = tried.gather(1, best[:, None])
    whole = Regression(features, labels, classes)
    weight_PDSC, bias_PSC = whole.folded(whole.solve(chosen))
    probes = []
    for x, weight_DSC, bias_SC, index in zip(features, weight_PDSC, bias_PSC, best.tolist(), strict=True):
        weight, bias = weight_DSC[:, 0].T.contiguous(), bias_SC[0]
        accuracy = (F.linear(x, weight, bias).argmax(-1) == labels).double().mean().item()
        probes.append(
            LinearProbe(
                weight=weight.cpu(),
                bias=bias.cpu(),
                strength=STRENGTHS[index],
                train_accuracy=accuracy,
                images=count,
            )
        )
    return probes


class Regression:
    """Standardised features, turned to their principal axes, where the loss has about the curvature of every axis.

    The penalty does not depend on the axes. The last row of weights is the bias, which is not penalised. Features are
    fp64; ``dtype`` is that of the solver.
    """

    def __init__(self, features_PND: Tensor, labels: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> None:
        self.labels = labels
        self.classes = classes
        self.mean = features_PND.mean(1, keepdim=True)
        std = features_PND.std(1, unbiased=False, keepdim=True)
        self.scale = torch.where(std > _CONSTANT * self.mean.abs(), 1 / std, 0.0)
        x = (features_PND - self.mean) * self.scale
        values, self.axes = torch.linalg.eigh(x.mT @ x / x.shape[1])
        # along an axis that features vary on by rounding alone, weights are to stay zero
        values = torch.where(values > _ROUNDING * values[:, -1:], values, 0.0)
        self.x = torch.cat([x @ self.axes * (values > 0)[:, None], torch.ones_like(x[..., :1])], -1).to(dtype)
        self.spread = torch.cat([values, torch.ones_like(values[:, :1])], -1).to(dtype)

    def loss(self, weight_PDSC: Tensor, strengths_PS: Tensor) -> tuple[Tensor, Tensor]:
        """The regularised losses (P, S), and their gradient in the form of the weights (P, D + 1, S, C)."""
        sets, rows, strengths, classes = weight_PDSC.shape
        images = self.x.shape[1]
        penalty = strengths_PS[:, None, :, None].expand(-1, rows, -1, -1).clone()
        penalty[:, -1] = 0
        gradient = torch.zeros_like(weight_PDSC)
        total = torch.zeros_like(strengths_PS)
        step = max(1, _MOST_LOGITS // (sets * strengths * classes))
        for x, labels in zip(torch.split(self.x, step, 1), torch.split(self.labels, step), strict=True):
            errors = torch.unflatten(x @ weight_PDSC.flatten(2), 2, (strengths, classes)).log_softmax(-1)
            index = labels.view(1, -1, 1, 1).expand(sets, -1, strengths, 1)
            total -= errors.gather(-1, index).sum((1, 3))
            errors.exp_().scatter_add_(-1, index, errors.new_tensor(-1.0).expand(index.shape))
            gradient += torch.unflatten(x.mT @ errors.flatten(2), 2, (strengths, classes))
        penalised = penalty * weight_PDSC
        return total / images + (penalised * weight_PDSC).sum((1, 3)) / 2, gradient / images + penalised

    def solve(self, strengths_PS: Tensor, tolerance: float = _TOLERANCE) -> Tensor:
        """The weights (P, D + 1, S, C) at which the gradient is zero, up to the tolerance.

        L-BFGS on all problems at once, in variables in which the Hessian is near the identity at the start.
        """
        strengths_PS = strengths_PS.to(self.x.dtype)
        penalty = strengths_PS[:, None, :, None] * torch.ones_like(self.spread)[:, :, None, None]
        penalty[:, -1] = 0
        # of uniform predictions the Hessian is that of the features over the number of classes
        scale = (self.spread[:, :, None, None] / self.classes + penalty).clamp_min(1e-12).rsqrt()
        weight = torch.zeros(*scale.shape[:3], self.classes, dtype=scale.dtype, device=scale.device)
        loss, gradient = self.loss(weight, strengths_PS)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        stuck = torch.zeros_like(loss, dtype=torch.bool)
        for _ in range(_MOST_STEPS):
            done = stuck | (gradient.abs().amax((1, 3)) <= tolerance)
            if done.all():
                break
            direction = _direction(gradient * scale, history) * scale
            direction *= ~done[:, None, :, None]
            slope = _dot(gradient, direction)
            length = torch.ones_like(loss)
            for _ in range(30):
                step = length[:, None, :, None] * direction
                new_loss, new_gradient = self.loss(weight + step, strengths_PS)
                # near the optimum losses differ by rounding alone
                good = new_loss <= loss + 1e-4 * length * slope + 4 * torch.finfo(loss.dtype).eps * loss.abs()
                if good.all():
                    break
                length = torch.where(good, length, length / 2)
            stuck |= ~good
            change = (new_gradient - gradient) * scale
            curvature = _dot(step / scale, change)
            history = [*history, (step / scale, change, torch.where(curvature > 0, 1 / curvature, 0.0))][-_MEMORY:]
            weight, loss, gradient = weight + step, new_loss, new_gradient
        else:
            stuck |= ~done
        if stuck.any():
            log.warning(
                "%d of %d probes are not at their optimum: the largest gradient is %.1e",
                int(stuck.sum()),
                stuck.numel(),
                gradient.abs().max().item(),
            )
        return weight

    def folded(self, weight_PDSC: Tensor) -> tuple[Tensor, Tensor]:
        """fp64 weights (P, D, S, C) and bias (P, S, C) for the features as they are."""
        weight_PDSC = weight_PDSC.double()
        weight = torch.unflatten(self.axes @ weight_PDSC[:, :-1].flatten(2), 2, weight_PDSC.shape[2:])
        weight = weight * self.scale[:, 0, :, None, None]
        return weight, weight_PDSC[:, -1] - torch.einsum("pd,pdsc->psc", self.mean[:, 0], weight)


def _dot(a_PDSC: Tensor, b_PDSC: Tensor) -> Tensor:
    return (a_PDSC * b_PDSC).sum((1, 3))


def _direction(gradient: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Minus the approximate inverse Hessian times the gradient: the two loops of L-BFGS, a factor per problem."""
    direction = -gradient
    factors = []
    for step, change, inverse in reversed(history):
        factor = inverse * _dot(step, direction)
        direction = direction - factor[:, None, :, None] * change
        factors.append(factor)
    if history:
        step, change, inverse = history[-1]
        ratio = torch.where(inverse > 0, 1 / (inverse * _dot(change, change)), 1.0)
        direction = direction * ratio[:, None, :, None]
    for (step, change, inverse), factor in zip(history, reversed(factors), strict=True):
        again = factor - inverse * _dot(change, direction)
        direction = direction + again[:, None, :, None] * step
    return direction
