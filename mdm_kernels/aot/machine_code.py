"""What the machine code of a compiled kernel costs: registers, memory, and the instructions that speed depends on.

Read from what the compiler wrote, by the tools in Triton's own wheel: nothing here needs a GPU. Counts of instructions
are static: one in a loop counts once, however often it runs.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What kernels are compiled for, and what one multiprocessor of it (on AMD: compute unit) holds."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    """bytes of shared memory that a program may have"""
    shared_total: int
    """bytes that the programs on a multiprocessor share; each costs shared_total − shared_limit besides its own"""
    warps: int
    """warps that a multiprocessor holds at most, a quarter of them on each of its four schedulers"""

    @property
    def has_tma(self) -> bool:
        """Whether it copies tiles by their descriptors, asynchronously."""
        return isinstance(self.arch, int) and self.arch >= 90


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 164 * 1024, 64),
    "sm_89": Target("cuda", 89, 32, 99 * 1024, 100 * 1024, 48),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 228 * 1024, 64),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 228 * 1024, 64),
    "sm_120": Target("cuda", 120, 32, 99 * 1024, 100 * 1024, 48),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32),
}

REGISTERS = 512  # for each thread of a warp that a scheduler holds, on every target
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100


def occupancy(target: Target, registers: int, shared: int, tensor_memory: int, warps: int) -> float:
    """Give the share, 0…1, of a multiprocessor's places for warps that programs of `warps` warps fill; an upper
    bound."""
    by_registers = REGISTERS // (-(-registers // 8) * 8) * 4  # registers are given out in eights
    programs = min(by_registers, target.warps) // warps
    programs = min(programs, target.shared_total // max(shared + target.shared_total - target.shared_limit, 1))
    if tensor_memory:
        programs = min(programs, TENSOR_MEMORY // tensor_memory)
    return programs * warps / target.warps


def measure(compiled, instructions: bool = True) -> dict[str, int]:
    """Measure a kernel that Triton compiled: registers a thread, bytes of stack, spilled registers, bytes of shared
    memory, columns of tensor memory, warps, and how many products of matrices round float32 to tf32 (one of
    `input_precision="ieee"` never does).

    instructions: count them too, and of them loads from global memory, stores to it, those of both that move 16 bytes
    a thread or a tile by TMA, and those for the matrix units. NVIDIA's disassembler takes a quarter of a second for
    that.
    """
    metadata = compiled.metadata
    cost = {
        "shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", 0),
        "warps": metadata.num_warps,
    }
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            cost |= nvidia_registers(file.name)
            cost |= nvidia_instructions(_disassembly(file.name)) if instructions else {}
        return cost | {"tf32": rounding_products(compiled.asm["ptx"])}
    assembly = compiled.asm["amdgcn"]
    cost |= amd_registers(assembly) | (amd_instructions(assembly) if instructions else {})
    return cost | {"tf32": rounding_products(assembly)}


def rounding_products(assembly: str) -> int:
    """Count the products of matrices that read float32 as tf32: mma.sync.….tf32, wgmma.….tf32, tcgen05.mma.….kind::tf32
    in PTX, v_mfma_….xf32 on AMD."""
    return len(re.findall(r"mma[\w.:]*tf32|v_mfma_\w*xf32", assembly))


def nvidia_registers(cubin: str) -> dict[str, int]:
    """Read the registers, stack and spills of the kernel in a file. Ours have no arrays of their own: every stack byte
    is a spilled register's."""
    usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = (_number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "spills": stack // 4}


def _disassembly(cubin: str) -> str:
    return _nvidia_tool("nvdisasm", "--print-code", "--no-dataflow", cubin)


def _number(pattern: str, text: str) -> int:
    """What the group of the pattern's first match says. Raises ValueError if there is none."""
    if not (match := re.search(pattern, text)):
        raise ValueError(f"{pattern}: not in what the tool printed, {text[:200]!r}")
    return int(match[1])


def _nvidia_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def nvidia_instructions(assembly: str) -> dict[str, int]:
    """Count instructions in what nvdisasm prints, one a line: /*0850*/ @P0 LDG.E.128 R4, desc[UR6][R2.64] ;"""
    opcodes = re.findall(r"^[ \t]+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", assembly, re.MULTILINE)
    # a wide one may say LDG.E.128.CONSTANT; 256 is Blackwell's; LTC128B is a hint to the cache; UTMALDG moves a tile
    return _counts(opcodes, r"LDG(STS)?\.|UTMALDG\b", r"STG\.", r".*\.(128|256)\b|UTMALDG", r"(UTC)?[A-Z]G?MMA\b")


def amd_registers(assembly: str) -> dict[str, int]:
    """Read the registers, stack and spills from the metadata at the end of the assembly. A scalar register that moves
    to a lane of a vector register is no spill; one that goes to memory shows as stack."""

    def metadata(key: str) -> int:
        return _number(rf"\.{key}:\s+(\d+)", assembly)

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count"),
    }


def amd_instructions(assembly: str) -> dict[str, int]:
    """Count instructions in LLVM's assembly, one a line: buffer_load_dwordx4 v[0:3], v2, s[4:7], 0 offen"""
    opcodes = re.findall(r"^[ \t]+([a-z]\w+)", assembly, re.MULTILINE)
    return _counts(opcodes, r"(global|buffer|flat)_load_", r"(global|buffer|flat)_store_", r".*_dwordx4\b", r"v_mfma_")


def _counts(opcodes: list[str], load: str, store: str, wide: str, matrix: str) -> dict[str, int]:
    """How many opcodes begin with each pattern."""

    def matching(pattern: str, among: list[str]) -> list[str]:
        return [opcode for opcode in among if re.match(pattern, opcode)]

    loads, stores = matching(load, opcodes), matching(store, opcodes)
    return {
        "instructions": len(opcodes),
        "loads": len(loads),
        "wide_loads": len(matching(wide, loads)),
        "stores": len(stores),
        "wide_stores": len(matching(wide, stores)),
        "matrix": len(matching(matrix, opcodes)),
    }
