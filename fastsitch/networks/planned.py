"""What planning needs to know of a network: its positions and their cost, from its name alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastsitch.networks.checkpoint import namesake, read_record
from fastsitch.networks.definition import require_definition
from fastsitch.networks.layout import Shape
from fastsitch.networks.names import BLOCKS, NetworkName
from fastsitch.networks.resnet import position_shapes
from fastsitch.root import Root


@dataclass(frozen=True)
class PlannedNetwork:
    """Names and shapes of all positions, forward FLOPs per image of every segment, and whether it is trained.

    ``head`` are the FLOPs behind the last position, which count for nothing in the small ResNets.
    """

    positions: list[tuple[str, Shape]]
    flops: list[float]
    trained: bool
    head: float = 0.0


def planned_network(
    root: Root, dataset: str, name: NetworkName, *, width: int, size: tuple[int, int]
) -> PlannedNetwork:
    """A network of a data set whose images have this height and width; it need not be trained.

    A small ResNet that is not trained yet is taken to have ``width`` channels in its first stage. Raises NetworkError
    for a name that is neither built in nor added.
    """
    folder = root.models(dataset)
    record = namesake(folder, name) if name.random else read_record(folder, name)
    if name.built_in:
        channels = width if record is None else record.width
        blocks = BLOCKS[name.architecture]
        positions = position_shapes(blocks, channels, size if record is None else record.input_shape[1:])
        return PlannedNetwork(
            list(positions), resnet_flops(blocks, [shape for _, shape in positions]), record is not None
        )
    definition = None if record is None else record.definition
    if definition is None:
        definition = require_definition(root.networks(dataset), name.architecture)
    return PlannedNetwork(
        [(position.name, position.rows) for position in definition.positions],
        list(definition.flops[:-1]),
        record is not None,
        definition.flops[-1],
    )


def resnet_flops(blocks: tuple[int, ...], shapes: Sequence[Shape]) -> list[float]:
    """Forward FLOPs per image of the stem, which sees three channels, and of every block."""
    channels, height, width = shapes[0]
    flops = [2.0 * height * width * channels * 27]
    for (before, _, _), (channels, height, width) in pairwise(shapes):
        taps = 9 * before + 9 * channels + (before if before != channels else 0)
        flops.append(2.0 * height * width * channels * taps)
    assert len(flops) == 1 + sum(blocks)
    return flops
