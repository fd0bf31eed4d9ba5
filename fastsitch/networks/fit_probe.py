"""Fitting the probe of an added network to the features of a data set's training images."""

import logging

import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.data import ImageFiles, Split, Transform
from fastsitch.errors import NetworkError
from fastsitch.networks.feature_head import ProbedNetwork, features_and_probe
from fastsitch.networks.linear_probe import LinearProbe, fit_probes

log = logging.getLogger(__name__)

_IMAGES = 256
"""Per forward pass."""


def fit_probe(module: ProbedNetwork, chain: Chain, split: Split, transform: Transform) -> LinearProbe:
    """Give a network, and its chain, the probe that fits its features of these images; every image is run once.

    Chain and images share a device. Raises NetworkError where the features are not finite.
    """
    features, layer = features_and_probe(chain)
    (probe,) = fit_probes(network_features(features, split, transform)[None], split.labels, layer.out_features)
    with torch.no_grad():
        for each in (layer, module.probe):
            each.weight.copy_(probe.weight)
            each.bias.copy_(probe.bias)
    log.info(
        "the probe is right on %.1f %% of the %d training images, strength %g",
        100 * probe.train_accuracy,
        probe.images,
        probe.strength,
    )
    return probe


@torch.no_grad()
def network_features(features: nn.Module, split: Split, transform: Transform) -> Tensor:
    """The features (N, D) of all images of a split, in fp32."""
    if isinstance(split.images, ImageFiles):
        split.images.announce()
    starts = range(0, len(split), _IMAGES)
    return torch.cat([features(transform.apply(split.images[start : start + _IMAGES])).float() for start in starts])


def require_finite_features(features: nn.Module, split: Split, transform: Transform, what: str) -> None:
    """Raise NetworkError, which begins with ``what``, where a network's features of the first images are not finite."""
    if not network_features(features, split[:_IMAGES], transform).isfinite().all():
        raise NetworkError(f"{what}: its features are not finite; expected usable weights")
