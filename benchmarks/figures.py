"""What `kernels.py` measured, in pictures: python -m benchmarks.figures benchmarks/results/DEVICE/kernels.json

roofline.png: how near each op comes to what the machine can do. speedups.png: how much faster it is than its rivals.
"""

import itertools
import math
import sys
from pathlib import Path

from benchmarks.contenders import COMPILED, OURS, PYTORCH, SDPA
from benchmarks.kernel_report import read_json
from benchmarks.measure import BOTH, FORWARD, KernelRow

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8c564b", "#aa4499")
RIVALS = {PYTORCH: "#999999", COMPILED: "#e69f00", "fastest SDPA": "#56b4e9", "fastest library": "#cc79a7"}


def plot(results: Path) -> None:
    """Plot both pictures, beside the results; where matplotlib is missing, print a line that says how to plot them
    elsewhere."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: no pictures; later, elsewhere: python -m benchmarks.figures {results}")
        return
    matplotlib.use("Agg")
    machine, rows = read_json(results)
    rows = [row for row in rows if row.seconds(OURS)]
    if rows:
        _roofline(machine, rows, results.with_name("roofline.png"))
        _speedups(machine, rows, results.with_name("speedups.png"))


def _largest_batches(rows: list[KernelRow]) -> list[KernelRow]:
    """Of the rows that differ in nothing but the batch, with which a shape begins, the last: the largest."""
    return list({(row.op, row.shape.split("×", 1)[1], row.step): row for row in rows}.values())


def _title(machine: dict) -> str:
    who = "mdm_kernels" if machine["kernels ran"] else "PyTorch references of mdm_kernels (no kernel ran)"
    return f"{who} on {machine['device']}, {machine['dtype']}, largest batches"


def _roofline(machine: dict, rows: list[KernelRow], path: Path) -> None:
    """Left: each op's rate over its arithmetic intensity, under the measured roofs. Right: a line for each op and shape
    with the share of the roof that it reaches. A full dot is the forward pass, a ring forward and backward."""
    import matplotlib.pyplot as plt

    rows = _largest_batches(rows)
    colours = dict(zip(dict.fromkeys(row.op for row in rows), itertools.cycle(COLOURS)))
    lines = list(dict.fromkeys((row.op, row.shape) for row in rows))[::-1]
    size = (17, max(7, 2 + 0.24 * len(lines)))
    figure, (roofs, shares) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2))
    _plot_roofs(roofs, machine, [row.operations / row.least_bytes for row in rows])
    for row in rows:
        fill = colours[row.op] if row.step == FORWARD else "none"
        style = {"marker": "o", "color": colours[row.op], "markerfacecolor": fill, "markersize": 8, "linestyle": ""}
        time = row.seconds(OURS) or math.nan
        roofs.plot(row.operations / row.least_bytes, row.operations / time / 1e12, **style)
        shares.plot(100 * row.floor / time, lines.index((row.op, row.shape)), **style)
    shares.set_yticks(range(len(lines)), [f"{op}  {shape}" for op, shape in lines], fontsize=8)
    for label, (op, _) in zip(shares.get_yticklabels(), lines, strict=True):
        label.set_color(colours[op])
    shares.set_ylim(-1, len(lines))
    shares.set_xlim(0, 105)
    shares.set_xlabel("% of the roof")
    shares.grid(color="#eeeeee")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour, label=op) for op, colour in colours.items()]
    handles.append(plt.Line2D([], [], marker="o", linestyle="", color="black", label=FORWARD))
    handles.append(plt.Line2D([], [], marker="o", linestyle="", color="black", markerfacecolor="none", label=BOTH))
    roofs.legend(handles=handles, loc="lower right", frameon=False)
    figure.suptitle(_title(machine))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_roofs(panel, machine: dict, intensities: list[float]) -> None:
    copy, matrix = machine["copy GB/s"] / 1e3, machine["matrix TFLOP/s"]  # both in 10¹² a second
    ridge = matrix / copy
    left, right = min(intensities) / 4, max(*intensities, ridge) * 4
    panel.plot([left, ridge, right], [left * copy, matrix, matrix], color="black", linewidth=1.5)
    panel.annotate(f"copy {machine['copy GB/s']:.0f} GB/s ", (ridge / 5, matrix / 5), ha="right", va="bottom")
    panel.annotate(f"matrix product {matrix:.3g} TFLOP/s", (right, matrix), ha="right", va="bottom")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(left, right)
    panel.set_xlabel("operations a byte that must move")
    panel.set_ylabel("TFLOP/s")
    panel.grid(which="major", color="#eeeeee")


def _speedups(machine: dict, rows: list[KernelRow], path: Path) -> None:
    """A line for each row, a dot on it for each rival: how many times as long it takes."""
    import matplotlib.pyplot as plt

    rows = _largest_batches(rows)[::-1]
    figure, panel = plt.subplots(figsize=(11, 2 + 0.24 * len(rows)))
    for y, row in enumerate(rows):
        ours = row.seconds(OURS) or math.nan
        for rival, seconds in _fastest_of_each_kind(row).items():
            panel.plot(seconds / ours, y, "o", color=RIVALS[rival], markersize=7)
    panel.set_yticks(range(len(rows)), [f"{row.op}  {row.shape}  {_short(row.step)}" for row in rows], fontsize=8)
    panel.set_ylim(-1, len(rows))
    panel.axvline(1, color="black", linewidth=1.5)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}×")
    panel.set_xlabel("time of a rival over ours: right of the line ours is faster")
    panel.grid(color="#eeeeee")
    panel.set_axisbelow(True)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour, label=who) for who, colour in RIVALS.items()]
    panel.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(handles), frameon=False)
    figure.suptitle(_title(machine))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short(step: str) -> str:
    return "fwd" if step == FORWARD else "fwd + bwd"


def _fastest_of_each_kind(row: KernelRow) -> dict[str, float]:
    def kind(name: str) -> str:
        if name in (PYTORCH, COMPILED):
            return name
        return "fastest SDPA" if name.startswith(SDPA) else "fastest library"

    fastest: dict[str, float] = {}
    for name, seconds in row.rivals().items():
        fastest[kind(name)] = min(seconds, fastest.get(kind(name), math.inf))
    return fastest


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.figures RESULTS/kernels.json")
    plot(Path(sys.argv[1]))
