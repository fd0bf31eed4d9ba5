"""Choose the tile configuration of a launch.

A choice is made once per kernel, device and shape: an override if there is one, else a remembered choice (measured ones
come from :mod:`fastsitch.kernels.tuning`), else the configuration that is predicted to be fastest from its traffic.
The prediction is arithmetic on the shape, so that the same run on the same machine stays bit-equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fastsitch.kernels.launch_plan import ForwardPlan, GradPlan, cut_forward, cut_grad
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import CONFIGS, FORWARD, GRAD, DeviceLimits, TileConfig, candidates
from fastsitch.kernels.traffic import forward_traffic, grad_traffic

_chosen: dict[tuple[str, str, StitchShape], TileConfig] = {}
_overrides: dict[str, TileConfig] = {}


def forward_plan(shape: StitchShape, limits: DeviceLimits) -> ForwardPlan:
    """The forward launch, cut into tiles of the chosen configuration."""
    return cut_forward(shape, choose(FORWARD, shape, limits), limits)


def grad_plan(shape: StitchShape, limits: DeviceLimits) -> GradPlan:
    """The gradient launch, cut into tiles of the chosen configuration."""
    return cut_grad(shape, choose(GRAD, shape, limits), limits)


def choose(kernel: str, shape: StitchShape, limits: DeviceLimits) -> TileConfig:
    """The configuration of this launch; see the module's docstring."""
    if kernel in _overrides:
        return _overrides[kernel]
    key = (kernel, limits.name, shape)
    if key not in _chosen:
        fitting = candidates(kernel, shape, limits)
        _chosen[key] = min(fitting, key=lambda config: predicted_seconds(kernel, shape, config, limits))
    return _chosen[key]


def predicted_seconds(kernel: str, shape: StitchShape, config: TileConfig, limits: DeviceLimits) -> float:
    """Time of a configuration, predicted from its traffic: good for ranking, not as a time."""
    if kernel == FORWARD:
        forward = cut_forward(shape, config, limits)
        return forward_traffic(shape, forward, limits).predicted_seconds(_fill(forward.programs, limits))
    grad = cut_grad(shape, config, limits)
    return grad_traffic(shape, grad, limits).predicted_seconds(_fill(grad.programs, limits))


def remember(kernel: str, shape: StitchShape, limits: DeviceLimits, config: TileConfig) -> None:
    """Make ``config`` the choice for this kernel, device and shape; launches after this one use it."""
    _chosen[kernel, limits.name, shape] = config


def forget_choices() -> None:
    """Forget all choices that were made or remembered."""
    _chosen.clear()


def choices() -> dict[tuple[str, str, StitchShape], TileConfig]:
    """A copy of all choices so far, by kernel, device and shape, for provenance."""
    return dict(_chosen)


@contextmanager
def override_config(kernel: str, config: TileConfig) -> Iterator[None]:
    """Use ``config`` for every launch of ``kernel`` inside the block, whatever the shape."""
    if kernel not in CONFIGS:
        raise ValueError(f"expected one of {sorted(CONFIGS)}, got {kernel!r}")
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


def _fill(programs: int, limits: DeviceLimits) -> float:
    """Share of the device in use: two programs per processor hide most of each other's waiting."""
    return min(1.0, programs / (2 * limits.processors))
