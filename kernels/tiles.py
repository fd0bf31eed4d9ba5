"""Tile configurations as data, and which of them fit a device."""

from dataclasses import asdict, dataclass

import torch

from fastsitch.kernels.shapes import StitchShape

# registers of one processor, on every architecture since sm_70
REGISTER_FILE = 64 * 1024
# of one thread
MOST_REGISTERS = 255


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Sizes of one program's tile: ``block_m`` rows, ``block_n`` columns (k, d), ``block_f`` features."""

    block_m: int
    block_n: int
    block_f: int
    warps: int
    stages: int
    resident: int = 1
    """Programs meant to share a processor; sets how many registers each may use."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            smallest = 16 if name.startswith("block") else 1
            power = value > 0 and value & (value - 1) == 0
            if value < smallest or (name not in ("stages", "resident") and not power):
                raise ValueError(f"TileConfig.{name}: expected a power of two of at least {smallest}, got {value}")

    @property
    def registers(self) -> int:
        """Registers per thread with which ``resident`` programs fit; without this limit the assembler spills a few."""
        share = REGISTER_FILE // (32 * self.warps * self.resident)
        # registers are allocated in units of eight
        return min(MOST_REGISTERS, share // 8 * 8)

    @property
    def name(self) -> str:
        """A short label, as in ``m128n64f64w4s3``."""
        return f"m{self.block_m}n{self.block_n}f{self.block_f}w{self.warps}s{self.stages}"


@dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """The properties of a device on which choices depend."""

    name: str
    processors: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Of shared memory, for one program."""
    l2_bytes: int


H100 = DeviceLimits(name="NVIDIA H100", processors=132, shared_bytes=227 * 1024, l2_bytes=50 * 1024 * 1024)
"""Used where there is no device: in the interpreter, the compile report and the traffic table."""

FORWARD = "stitch_forward"
GRAD = "stitch_grad"

CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    FORWARD: (
        TileConfig(block_m=128, block_n=256, block_f=64, warps=8, stages=3),
        TileConfig(block_m=128, block_n=128, block_f=64, warps=8, stages=3),
        TileConfig(block_m=128, block_n=64, block_f=64, warps=4, stages=3, resident=2),
        TileConfig(block_m=64, block_n=64, block_f=32, warps=8, stages=3, resident=2),
    ),
    GRAD: (
        TileConfig(block_m=64, block_n=64, block_f=256, warps=8, stages=3),
        TileConfig(block_m=64, block_n=128, block_f=128, warps=8, stages=3),
        TileConfig(block_m=64, block_n=64, block_f=64, warps=4, stages=3, resident=2),
        TileConfig(block_m=32, block_n=64, block_f=64, warps=4, stages=3, resident=3),
    ),
}
"""The candidates of each kernel, at most four."""

# limits of a program that is short of registers: accumulators per thread, and rows or features per step
HUNGRY_ACCUMULATORS = 32
HUNGRY_STEP = 32


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; those of an H100 elsewhere."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        name=properties.name,
        processors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        l2_bytes=properties.L2_cache_size,
    )


def operand_bytes(kernel: str, config: TileConfig, itemsize: int) -> int:
    """Shared memory of all pipeline stages: the forward kernel loops over features, the gradient over rows."""
    if kernel == FORWARD:
        return config.stages * (config.block_m + config.block_n) * config.block_f * itemsize
    return config.stages * (config.block_f + config.block_n) * config.block_m * itemsize


def candidates(kernel: str, shape: StitchShape, limits: DeviceLimits) -> list[TileConfig]:
    """The configurations that fit the device's shared memory and leave this shape enough registers."""
    fitting = []
    for config in CONFIGS[kernel]:
        if operand_bytes(kernel, config, shape.itemsize) > limits.shared_bytes:
            continue
        if shape.register_hungry and not _is_small(kernel, config):
            continue
        fitting.append(config)
    if not fitting:
        raise ValueError(
            f"{kernel}: expected a device with at least 64 KiB of shared memory per program, "
            f"got {limits.name} with {limits.shared_bytes} bytes"
        )
    return fitting


def _is_small(kernel: str, config: TileConfig) -> bool:
    rows, step = (config.block_m, config.block_f) if kernel == FORWARD else (config.block_f, config.block_m)
    per_thread = rows * config.block_n // (32 * config.warps)
    return per_thread <= HUNGRY_ACCUMULATORS and step <= HUNGRY_STEP
