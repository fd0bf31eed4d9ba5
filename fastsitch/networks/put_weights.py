"""Named tensors put into a module, as if its own ``state_dict()`` had given them."""

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a module; raises what ``load_state_dict`` raises where they do not fit.

    They have the versions of the module's own layers (``_metadata``), for which some ask, such as MNASNet: a plain dict
    has none.
    """
    state = OrderedDict(weights)
    state._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(state)
