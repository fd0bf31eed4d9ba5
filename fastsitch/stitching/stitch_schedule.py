"""Steps and learning rates of the stitching recipes."""

from fastsitch.learning_rate import Schedule


def training_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of so many epochs, which may be fractional: at least one."""
    return max(1, round(epochs * steps_per_epoch))


def stitch_schedule(recipe: str, *, peak: float, epochs: float, steps_per_epoch: int) -> Schedule:
    """The schedule of a stitching recipe.

    ``paper`` and ``small``: one epoch of warm-up, or 10 % of the steps with fewer than 4 epochs, then cosine to 0.
    ``published-schedule``: the warm-up of 10 epochs in the authors' code, which 4 epochs never complete.
    """
    steps = training_steps(epochs, steps_per_epoch)
    if recipe == "published-schedule":
        warmup = 10 * steps_per_epoch
        return Schedule(peak=peak, steps=steps, warmup=warmup, decay_end=max(steps, warmup))
    warmup = steps_per_epoch if epochs >= 4 else max(1, round(0.1 * steps))
    return Schedule(peak=peak, steps=steps, warmup=warmup, decay_end=steps)
