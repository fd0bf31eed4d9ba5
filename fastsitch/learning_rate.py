"""Learning rates, step by step."""

import math
from dataclasses import dataclass

from fastsitch.vocabulary import Descent


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to ``peak``, then a descent to 0 at ``decay_end``; the run may stop earlier. In steps."""

    peak: float
    steps: int
    warmup: int
    decay_end: int
    descent: Descent = "cosine"

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.decay_end - self.warmup)
        if self.descent == "linear":
            return self.peak * (1 - progress)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
