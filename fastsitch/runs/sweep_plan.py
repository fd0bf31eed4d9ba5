"""Units, cells and stitches of a sweep, computed once and handed on."""

from collections.abc import Mapping, Sequence

from fastsitch.chains.layout import Shape
from fastsitch.chains.position import chosen_positions
from fastsitch.errors import ConfigError, argument
from fastsitch.network_names import NetworkName
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.stitching.cells import Cell, Unit, unit_cells
from fastsitch.stitching.geometry import Geometry

Positions = Mapping[NetworkName, Sequence[tuple[str, Shape]]]
"""Name and shape of every position of every network in a sweep."""

Geometries = Mapping[tuple[int, int], Geometry]
"""Of the cells (i, j) of a unit, by receiver position."""


class SweepPlan:
    """What a configuration comes to for networks whose positions are known."""

    def __init__(self, config: SweepConfig, positions: Positions) -> None:
        self.config = config
        self.positions = positions
        self.units: tuple[Unit, ...] = config.units
        self.shapes = {name: [shape for _, shape in named] for name, named in positions.items()}
        """Of every position of every network."""
        self._chosen = {
            network: chosen_positions([name for name, _ in named], config.positions)
            for network, named in positions.items()
        }
        self._geometries: dict[tuple[NetworkName, NetworkName], Geometries] = {}

    def chosen(self, network: NetworkName) -> list[int]:
        """The positions of a network that the sweep asks for."""
        return self._chosen[network]

    def held(self, network: NetworkName) -> list[Shape]:
        """The shapes of those positions: what a source of the network holds."""
        return [self.shapes[network][index] for index in self._chosen[network]]

    def cells(self, unit: Unit) -> list[Cell]:
        """The cells of a unit that the sweep asks for, by receiver position."""
        return unit_cells(unit, self._chosen[unit.sender_network], self._chosen[unit.receiver_network])

    def count(self, units: Sequence[Unit]) -> int:
        """Cells of some units."""
        return sum(len(self._chosen[u.sender_network]) * len(self._chosen[u.receiver_network]) for u in units)

    def geometries(self, unit: Unit) -> Geometries:
        """The kind of stitch of every cell of a unit; raises ConfigError where there is none."""
        names = (unit.sender_network, unit.receiver_network)
        if names not in self._geometries:
            sender, receiver = (self.positions[name] for name in names)
            found = {}
            for cell in self.cells(unit):
                (i, provided), (j, expected) = sender[cell.i], receiver[cell.j]
                try:
                    found[cell.i, cell.j] = Geometry.between(provided, expected, self.config.rules)
                except ConfigError as error:
                    raise ConfigError(f"{names[0]} {i} -> {names[1]} {j}: {error.message}") from None
            self._geometries[names] = found
        return self._geometries[names]

    def require_stitches(self) -> None:
        """Raise ConfigError for positions that are not there, and for cells that no stitch can join."""
        self._require_positions()
        for unit in self.units:
            self.geometries(unit)

    def _require_positions(self) -> None:
        patterns = self.config.positions
        names = {str(network): tuple(name for name, _ in named) for network, named in self.positions.items()}
        known = list(dict.fromkeys(name for named in names.values() for name in named))
        asked = argument("positions", patterns)
        unknown = [pattern for pattern in patterns if not chosen_positions(known, [pattern])]
        if unknown:
            raise ConfigError(
                f"{asked}: no network of the sweep has a position {' or '.join(unknown)}; they have {', '.join(known)}"
            )
        alike: dict[tuple[str, ...], list[str]] = {}
        for network, named in names.items():
            if not chosen_positions(named, patterns):
                alike.setdefault(named, []).append(network)
        if alike:
            there = "; ".join(f"{', '.join(networks)} has {', '.join(named)}" for named, networks in alike.items())
            raise ConfigError(f"{asked}: a network has none of these: {there}")
