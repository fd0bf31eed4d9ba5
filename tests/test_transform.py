"""From images to a network's inputs: as torchvision does it, and without resizing where sizes agree."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional

from fastsitch.data import Dataset, Normalisation, Transform, Views
from fastsitch.errors import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Normalisation(MEAN, STD)
SIZES = [(16, 16), (48, 48), (64, 64), (24, 40), (7, 33)]


@pytest.mark.parametrize("size", SIZES)
def test_it_equals_torchvisions_resize_and_normalize(size: tuple[int, int], fashion: Dataset) -> None:
    images = fashion.train.images[:20]
    x = Transform(IMAGENET, size).apply(images)
    assert x.shape == (20, 3, *size)
    assert x.is_contiguous(memory_format=torch.channels_last)
    pixels = functional.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    wanted = functional.normalize(functional.resize(pixels, list(size)), list(MEAN), list(STD))
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-5)
    # resized as bytes, as pictures often are, pixels are whole levels: at most one level apart
    resized = functional.resize(images.permute(0, 3, 1, 2), list(size))
    rounded = functional.normalize(functional.to_dtype(resized, torch.float32, scale=True), list(MEAN), list(STD))
    assert (x - rounded).abs().max() <= 1 / 255 / min(STD) + 1e-5
    assert (x - rounded).abs().mean() <= 0.5 / 255 / min(STD)


@pytest.mark.parametrize("resolution", [None, (32, 32)])
def test_images_of_the_networks_size_are_only_normalised(resolution: tuple[int, int] | None, fashion: Dataset) -> None:
    images = fashion.train.images[:20]
    views = Views.draw(20, 32, 32, torch.Generator().manual_seed(0))
    x = fashion.normalisation.apply(images)
    transform = Transform(fashion.normalisation, resolution)
    assert torch.equal(transform.apply(images), x)
    assert torch.equal(transform.apply(images, views), views.apply(x))
    mean, std = (list(values) for values in (fashion.normalisation.mean, fashion.normalisation.std))
    assert transform.to_dict((32, 32)) == {"mean": mean, "std": std}


def test_images_are_augmented_before_they_are_resized(fashion: Dataset) -> None:
    """Padding has the colour of the mean at every resolution."""
    images = fashion.train.images[:50]
    views = Views.draw(50, 32, 32, torch.Generator().manual_seed(1))
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    pixels = functional.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    seen = views.apply(pixels - mean) + mean
    wanted = functional.normalize(functional.resize(seen, [48, 48]), list(MEAN), list(STD))
    x = Transform(IMAGENET, (48, 48)).apply(images, views)
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-5)
    assert not torch.equal(x, Transform(IMAGENET, (48, 48)).apply(images))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_does_not_depend_on_the_others_in_its_batch(size: tuple[int, int], fashion: Dataset) -> None:
    images = fashion.train.images[:9]
    transform = Transform(IMAGENET, size)
    together = transform.apply(images)
    for k in range(9):
        assert torch.equal(transform.apply(images[k : k + 1])[0], together[k])


def test_it_is_written_as_a_dictionary_and_checks_its_values() -> None:
    transform = Transform(IMAGENET, (48, 32))
    assert transform.to_dict((32, 32)) == {"mean": list(MEAN), "std": list(STD), "resolution": [48, 32]}
    assert "resolution" not in transform.to_dict((48, 32))
    assert {transform: 1}[Transform(Normalisation(MEAN, STD), (48, 32))] == 1
    assert transform != replace(transform, resolution=None)
    with pytest.raises(ConfigError, match=r"resolution \(0, 32\): expected a height and a width of at least 1"):
        Transform(IMAGENET, (0, 32))
    with pytest.raises(ConfigError, match="expected a mean and a std above 0 for every channel"):
        Normalisation(MEAN, (0.2, 0.2, 0.0))
    with pytest.raises(ConfigError, match="expected a mean and a std above 0 for every channel"):
        Normalisation(MEAN, (0.2, 0.2))
