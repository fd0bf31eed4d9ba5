"""What this machine can do, and what ``auto`` means on it."""

import ctypes
import errno
import gc
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastsitch import kernels
from fastsitch.errors import ConfigError, argument
from fastsitch.vocabulary import Compile, Kernel, Precision, require_choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""Names of dtypes as used in options and files. fp64 is for exactness tests and has no option."""


def resolve_device(requested: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``; raises ConfigError."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{argument('device', requested)}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{argument('device', requested)}: found {torch.cuda.device_count()} CUDA device(s); use "
            f"{argument('device', 'cpu')}"
        )
    return device


def waiting_policy() -> str:
    """What the environment says of threads that wait for each other; see ``fastsitch/__init__.py``."""
    policy, turns = os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")
    if policy is not None:
        return f"as OMP_WAIT_POLICY={policy} says"
    return "as torch's OpenMP does" if turns is None else f"sleep after {turns} turns (GOMP_SPINCOUNT)"


def configure(device: torch.device) -> None:
    """Make results on this device repeatable bit by bit."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        # fp32 means fp32: TF32 would round the receiver's convolutions to 10 bits
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def resolve_precision(requested: str, device: torch.device) -> str:
    """``auto`` is bf16 where the device has it natively, otherwise fp32; raises ConfigError."""
    if requested == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    # fp64 has no option
    if requested not in DTYPES:
        require_choice("precision", requested, Precision)
    return requested


def resolve_kernel(requested: Kernel, device: torch.device) -> Kernel:
    """The implementation of the stitch operator on this device: ``triton`` or ``torch``; raises ConfigError."""
    require_choice("kernel", requested, Kernel)
    try:
        return kernels.resolve_kernel(requested, device)  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(f"{argument('kernel', requested)}: {error}") from None


def resolve_compile(requested: Compile, device: torch.device) -> Compile:
    """``auto`` is on where there is CUDA and off on CPUs, where it brings nothing; raises ConfigError."""
    require_choice("compile", requested, Compile)
    if requested == "auto":
        return "on" if device.type == "cuda" else "off"
    return requested


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _cgroup_headroom())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    # the CPU's allocator and oneDNN have no exception of their own, and C code that cannot make one leaves without
    texts = (
        "can't allocate memory",
        "not enough memory",
        "could not create a primitive",
        "without exception set",
        "without setting an exception",
    )
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def release_memory() -> None:
    """Give back what nothing refers to any more: to the device's driver, and to the operating system."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def _cgroup_headroom() -> int:
    """What the container's memory limit leaves, where there is one."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.is_file() or limit.read_text().strip() == "max":
        return sys.maxsize
    # cached file pages count as used, but give way to whoever needs the memory
    statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(statistics.get("inactive_file", 0))


def versions() -> dict[str, str]:
    """Versions that belong into the provenance of a result."""
    found = {"python": platform.python_version()}
    for name in ("fastsitch", "torch", "torchvision", "timm", "triton", "numpy", "zarr", "zarrs", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """A human-readable name of the CPU."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
