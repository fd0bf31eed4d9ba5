"""What planning needs to know of a network: its positions and their cost, from its name alone."""

from dataclasses import dataclass

from fastsitch.chains.layout import Shape
from fastsitch.data import DatasetSize
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.checkpoint import namesake, read_record
from fastsitch.networks.find_network import definitions_folder, models_folder
from fastsitch.networks.network_definition import require_definition
from fastsitch.networks.resnet import position_shapes, resnet_flops
from fastsitch.root import Root


@dataclass(frozen=True)
class NetworkShape:
    """Names and shapes of all positions, forward FLOPs per image, and whether the network is trained."""

    positions: list[tuple[str, Shape]]
    flops: tuple[float, ...]
    """Of every segment."""
    head_flops: float
    """Of what follows the last position."""
    trained: bool


def network_shape(root: Root, dataset: str, name: NetworkName, *, width: int, data: DatasetSize) -> NetworkShape:
    """The shape of a network for a data set of this size; the network need not be trained.

    A small ResNet that is not trained yet is taken to have ``width`` channels in its first stage. Raises NetworkError
    for a name that is neither built in nor added.
    """
    folder = models_folder(root, dataset, name)
    record = namesake(folder, name) if name.random else read_record(folder, name)
    positions: list[tuple[str, Shape]]
    if name.built_in:
        blocks = BLOCKS[name.architecture]
        channels, classes = (width, data.classes) if record is None else (record.width, record.classes)
        input_shape = (3, data.height, data.width) if record is None else record.input_shape
        positions = position_shapes(blocks, channels, input_shape[1:])
        *flops, head_flops = resnet_flops(blocks, channels, classes, input_shape)
    else:
        definition = None if record is None else record.definition
        if definition is None:
            definition = require_definition(definitions_folder(root, dataset, name.architecture), name.architecture)
        positions = [(position.name, position.rows) for position in definition.positions]
        *flops, head_flops = definition.flops
    return NetworkShape(positions, tuple(flops), head_flops, record is not None)
