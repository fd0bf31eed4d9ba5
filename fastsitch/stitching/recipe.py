"""How a group of stitches is trained."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastsitch.errors import ConfigError, argument
from fastsitch.vocabulary import Optimizer, StitchRecipe, is_positive, require_choice, require_whole

MOST_EPOCHS = 1_000_000

PEAK_RATES: dict[Optimizer, float] = {"sgd": 0.01, "preconditioned": 0.08}
"""Peak learning rate of each optimizer, where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """SGD on the sum over stitches of the mean loss over the batch; checked on construction."""

    name: StitchRecipe
    epochs: float
    """May be fractional: the last epoch then ends early."""
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    optimizer: Optimizer = "sgd"
    """``sgd``, or ``preconditioned``: SGD in whitened inputs, which needs their moments."""
    augment: bool = False
    """New random views of the training images in every epoch, for which the sender has to run again."""

    def __post_init__(self) -> None:
        require_choice("recipe", self.name, StitchRecipe)
        require_choice("optimizer", self.optimizer, Optimizer)
        if not is_positive(self.epochs) or self.epochs > MOST_EPOCHS:
            raise ConfigError(
                f"{argument('epochs', self.epochs)}: expected a number above 0, such as 2 or 0.5, and at most "
                f"{MOST_EPOCHS}"
            )
        require_whole("batch_size", self.batch_size)
        if not is_positive(self.lr):
            raise ConfigError(f"{argument('lr', self.lr)}: expected a number above 0")


_PUBLISHED: dict[str, Any] = {"epochs": 4, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}

STITCH_RECIPES: dict[StitchRecipe, TrainingRecipe] = {
    "paper": TrainingRecipe(name="paper", **_PUBLISHED),
    "small": TrainingRecipe(name="small", **{**_PUBLISHED, "epochs": 2, "batch_size": 64}),
    "published-schedule": TrainingRecipe(name="published-schedule", **_PUBLISHED, augment=True),
}
"""``paper`` as the text of the study states it, ``small`` for small data, ``published-schedule`` with the learning
rates and the random views of the images that the authors' code really used."""


def stitch_recipe(
    name: StitchRecipe,
    *,
    epochs: float | None = None,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
) -> TrainingRecipe:
    """A recipe by name, and what differs from it; raises ConfigError."""
    require_choice("recipe", name, StitchRecipe)
    changes: dict[str, Any] = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "batch_size": batch_size}
    # numpy's numbers become Python's, which files can hold
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in changes.items()}
    return replace(STITCH_RECIPES[name], **{key: value for key, value in plain.items() if value is not None})
