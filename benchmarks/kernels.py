"""What the compiler makes of the Triton kernels: registers, spills and shared memory, without any GPU.

python -m ttt_e2e.benchmarks.kernels
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..triton_attention import KERNELS, is_interpreted, kernel_settings

ARCHITECTURES = {80: "Ampere", 90: "Hopper"}
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOAT32_VECTORS = ("log_sums", "dots", "sums", "products")
# Bytes of shared memory that one program may take.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class CompiledKernel:
    """What one kernel takes on one architecture.

    Attributes:
        registers: of a thread. spilled: bytes a thread stores to memory because its registers are used up.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    architecture: int
    dtype: str
    channels: int
    registers: int
    spilled: int
    shared: int


def compile_kernel(name: str, architecture: int, dtype: torch.dtype, channels: int, groups: int = 2) -> CompiledKernel:
    """Compile a kernel of `triton_kernels` for heads of so many channels.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile kernels.")
    kernel = KERNELS[name]
    constants, options = kernel_settings(name, channels, 2 * groups, 2, dtype, exact=dtype == torch.float32)
    source = triton.compiler.ASTSource(kernel, _signature(kernel.arg_names, DTYPES[dtype]), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = _assembled(compiled.asm["ptx"], architecture)
    short = str(dtype).removeprefix("torch.")
    return CompiledKernel(name, architecture, short, channels, registers, spilled, compiled.metadata.shared)


def compile_all(channels: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[CompiledKernel]:
    """Every kernel, for every architecture."""
    for architecture in ARCHITECTURES:
        for dtype in dtypes:
            for count in channels:
                for name in KERNELS:
                    yield compile_kernel(name, architecture, dtype, count)


def _signature(names: list[str], pointer: str) -> dict[str, str]:
    kinds = {"tokens_read": "*i32", "scale": "fp32", "num_queries": "i32", "num_past": "i32", "num_sinks": "i32"}
    kinds |= {"window": "i32"} | dict.fromkeys(FLOAT32_VECTORS, "*fp32")
    return {name: "constexpr" if name.isupper() else kinds.get(name, pointer) for name in names}


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers and spilled bytes that the assembler reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target (\w+)", ptx).group(1)
        command = [get_ptxas(architecture).path, "-v", f"-arch={target}", str(path), "-o", str(path.with_suffix(".o"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said).group(1)
    return int(registers), int(re.search(r"(\d+) bytes spill stores", said).group(1))


def show_kernels() -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(CompiledKernel.__dataclass_fields__)
    table = Table(*names)
    for row in compile_all((64, 128, 256), (torch.bfloat16, torch.float32)):
        table.add_row(*map(str, asdict(row).values()))
    Console().print(table)


if __name__ == "__main__":
    show_kernels()
