"""What the ahead-of-time compiler found, as a table for a terminal, as JSON, and as Markdown for the documentation."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .machine_code import TARGETS, occupancy


@dataclass(frozen=True)
class Result:
    """One kernel, at one shape class, on one target; the figures are `machine_code.measure`'s."""

    shape_class: str
    kernel: str
    target: str
    variant: int = 1
    """which of the kernel's specializations at this shape class, in the order of their launches"""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    warps: int = 1
    instructions: int = 0
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    matrix: int = 0
    tf32: int = 0
    error: str = ""
    key: str = ""
    """by which `keys` tells whether these are still the kernel's figures; empty where they are not kept"""

    @property
    def label(self) -> str:
        """The kernel's name, with the number of a second or later specialization."""
        return self.kernel if self.variant == 1 else f"{self.kernel} #{self.variant}"

    @property
    def fault(self) -> str:
        """Why this kernel must not ship, in one line; empty if it may."""
        if self.error:
            return self.error
        if self.spills or self.stack:
            return f"spills {self.spills} registers ({self.stack} bytes of stack)"
        if self.shared > (limit := TARGETS[self.target].shared_limit):
            return f"needs {self.shared} bytes of shared memory; there are {limit}"
        if self.tf32:
            return f"rounds the inputs of {self.tf32} float32 products to tf32"
        return ""

    @property
    def occupancy(self) -> float:
        """The share, 0…1, of a multiprocessor's places for warps that this kernel can fill; an upper bound."""
        return occupancy(TARGETS[self.target], self.registers, self.shared, self.tensor_memory, self.warps)


def table(results: list[Result]) -> str:
    """Lay results out for a terminal, one a line, in columns."""
    header = ("shape class", "kernel", "target", "registers", "stack", "shared", "spills", "16-byte loads", "matrix")
    rows = [
        (r.shape_class, r.label, r.target, r.registers, r.stack, r.shared, r.spills, loads, r.matrix)
        for r, loads in ((result, f"{result.wide_loads}/{result.loads}") for result in results)
    ]
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    line = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(line.format(*row) for row in [header, *rows])


def write_json(path: Path, triton_version: str, results: list[Result]) -> None:
    """Write results, and the version of Triton that compiled them, to a file for `read_json`."""
    content = {"triton": triton_version, "kernels": [dataclasses.asdict(result) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[str, list[Result]]:
    """Read (Triton's version, results) as `write_json` wrote them."""
    content = json.loads(path.read_text())
    return content["triton"], [Result(**kernel) for kernel in content["kernels"]]


INTRODUCTION = """\
# The kernels, as compiled

Written by `make aot-report` with Triton {triton}, without a GPU, and not edited by hand; `benchmarks/results/aot.json`
has the same figures. Each kernel of `mdm_kernels` was compiled at the shape classes that the models use
(`mdm_kernels/aot/shape_classes.py`) for {targets}. Nothing on this page was timed;
`benchmarks/NOTES.md` has what an H100 took. At small batches the host takes longer to launch these kernels from Python
than the GPU to run them: sample with `engine="auto"` or `"graph"`, which replays CUDA graphs.

{summary}

A cell holds the values for {targets}, in this order, or one where they agree. What reads
by TMA is compiled for those of them that have it: {with_tma}.

* *registers*: of a thread; 255 is the limit on NVIDIA, 512 on AMD. *shared KB*: shared memory of a program.
* *occupancy*: the share of a multiprocessor's places for warps that fit beside each other with these registers and this
  shared memory. Kernels that wait for memory want much of it; matrix products run well with little.
* *16-byte loads*, *16-byte stores*: among the instructions that read or write global memory, those that move 16 bytes a
  thread, or a tile by TMA. The others move what is small or narrow: statistics, masks, parameters of a channel.
* *matrix*: instructions for the matrix units: HMMA on sm_80, HGMMA on sm_90 and UTCHMMA on sm_100, which do far more
  each, v_mfma on gfx942. Float32 inputs have none on NVIDIA, whose units would round them to tf32.

Counts are of instructions in the code: one in a loop counts once, and one in a branch not taken counts too.
"""

COLUMNS = (
    "shape class",
    "kernel",
    "registers",
    "shared KB",
    "occupancy %",
    "instructions",
    "16-byte loads",
    "16-byte stores",
    "matrix",
    "note",
)


def markdown(triton_version: str, results: list[Result]) -> str:
    """Give a page with a table for every op: a row for each kernel at each shape class, its targets side by side."""
    targets = [name for name in TARGETS if any(result.target == name for result in results)]
    sections = [
        INTRODUCTION.format(
            triton=triton_version,
            targets=", ".join(targets),
            with_tma=", ".join(name for name in targets if TARGETS[name].has_tma),
            summary=_summary(results, targets),
        )
    ]
    for op in dict.fromkeys(_op(result) for result in results):
        rows: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            if _op(result) == op:
                rows.setdefault((result.shape_class.removeprefix(op + " "), result.label), []).append(result)
        lines = [_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
        lines += [_line((*name, *_cells(row))) for name, row in rows.items()]
        sections.append(f"## {op}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


def _op(result: Result) -> str:
    """Shape classes are named after the op that they call: `flash 8×64, 1024`."""
    return result.shape_class.split()[0]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: list[Result]) -> tuple[str, ...]:
    """The columns after the name, of one kernel on all targets."""
    compiled = [result for result in row if not result.error]

    def each(value: Callable[[Result], str]) -> str:
        values = [value(result) for result in compiled]
        return values[0] if len(set(values)) == 1 else " · ".join(values)

    return (
        each(lambda r: str(r.registers)),
        each(lambda r: "<1" if 0 < r.shared < 1024 else f"{r.shared / 1024:.0f}"),
        each(lambda r: f"{100 * r.occupancy:.0f}"),
        each(lambda r: str(r.instructions)),
        each(lambda r: f"{r.wide_loads}/{r.loads}"),
        each(lambda r: f"{r.wide_stores}/{r.stores}"),
        each(lambda r: str(r.matrix)),
        "; ".join(_notes(row)),
    )


def _notes(row: list[Result]) -> list[str]:
    return [f"**{result.target}: {result.fault}**" for result in row if result.fault]


def _summary(results: list[Result], targets: list[str]) -> str:
    """The answers that a reader looks for first."""
    faults = sum(bool(result.fault) for result in results)
    shared = {name: max(result.shared for result in results if result.target == name) / 1024 for name in targets}
    limits = ", ".join(f"{shared[name]:.0f} of {TARGETS[name].shared_limit // 1024} KB on {name}" for name in targets)
    return (
        f"* {len(results)} compilations, of which {faults} failed, spill registers, need too much shared memory,\n"
        "  or round float32 products to tf32.\n"
        f"* Most shared memory of a program: {limits}. sm_86 has\n  what sm_89 has."
    )
