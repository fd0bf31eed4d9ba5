"""Compile a launch for a GPU that this machine does not have, and inspect the result.

triton's own binder makes the signature from the launch's arguments (meta tensors will do), so the result is what the
device would build: the same integer widths, alignments and constants.
"""

import linecache
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastsitch.kernels.launch import Launch

# by sm: bytes of shared memory of a processor, and of one program at most; the system takes 1 KiB of each program
SHARED = {80: (164 * 1024, 163 * 1024), 90: (228 * 1024, 227 * 1024), 100: (228 * 1024, 227 * 1024)}
REGISTERS = 64 * 1024
THREADS = 2048

# warp-level, warpgroup-level and tensor-memory matrix instructions in SASS
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
# global loads and stores and asynchronous copies, with their modifiers
GLOBAL_ACCESS = re.compile(r"\b(?:LDGSTS|LDG|STG)\b((?:\.\w+)*)")
SOURCE_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
# the accesses to tiles, by their pointers in the kernels' source; the others are biases, tables and indices
TILE_ACCESS = re.compile(r"tl\.(?:load|store)\(p_(?:rows|cols|xf|gy|col|y|w|p)\b")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the assembler reports about one kernel on one target."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: bool
    vector_bytes: int
    """The narrowest access of one thread to a tile in global memory."""
    programs_per_processor: int
    """Programs that one processor can hold."""


def compile_launch(launch: Launch, sm: int) -> Compiled:
    """Build ``launch`` for compute capability ``sm`` (80, 90, 100), without a driver."""
    kernel = launch.kernel
    target = GPUTarget("cuda", sm, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=target, options=options)
    return _inspect(built.asm["cubin"], built.metadata.shared, built.metadata.num_warps, sm)


def _inspect(cubin: bytes, shared: int, warps: int, sm: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        sass = _tool("nvdisasm", "-g", "-c", str(path))
    registers = int(_field(usage, "REG"))
    # triton uses no stack: bytes there, or in local memory, are spilled registers
    spills = int(_field(usage, "STACK")) + int(_field(usage, "LOCAL"))
    return Compiled(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        tensor_core=TENSOR_CORE.search(sass) is not None,
        vector_bytes=min(_tile_accesses(sass)),
        programs_per_processor=occupancy(registers, shared, warps, sm),
    )


def occupancy(registers: int, shared: int, warps: int, sm: int) -> int:
    """Programs that one processor can hold, by registers, shared memory and threads."""
    # registers are handed out in units of 8 per thread
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[sm][0] // (shared + 1024)
    return min(by_registers, by_shared, THREADS // (32 * warps))


def _access_bytes(modifiers: str) -> int:
    """Bytes of one access; 4 without a modifier."""
    for modifier in modifiers.split("."):
        if modifier in ("256", "128", "64"):
            return int(modifier) // 8
        if modifier in ("U16", "S16", "16"):
            return 2
    return 4


def _tile_accesses(sass: str) -> list[int]:
    """Bytes per thread of every access to a tile, found through the line table."""
    widths = []
    line = ""
    fresh = True
    for text in sass.splitlines():
        if marker := SOURCE_LINE.search(text):
            # of several markers in a row the first is the innermost call
            if fresh:
                line = linecache.getline(_here(marker[1]), int(marker[2]))
            fresh = False
            continue
        fresh = True
        access = GLOBAL_ACCESS.search(text)
        if access and TILE_ACCESS.search(line):
            widths.append(_access_bytes(access[1]))
    return widths


def _here(path: str) -> str:
    """The same source in this checkout: triton's cache goes by content, and keeps the path of the first build."""
    source = Path(__file__).with_name(Path(path).name)
    return str(source) if source.is_file() else path


def _field(usage: str, name: str) -> str:
    match = re.search(rf"\b{name}:(\d+)", usage)
    if match is None:
        raise ValueError(f"expected a field {name} in cuobjdump's resource usage, got {usage!r}")
    return match.group(1)


def _tool(name: str, *arguments: str) -> str:
    knob: Any = getattr(triton.knobs.nvidia, name)
    result = subprocess.run([knob.path, *arguments], capture_output=True, text=True, check=True)
    return result.stdout
