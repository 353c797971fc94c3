"""What the Triton kernels become on an H100 or H200, and how long their loops wait; without a GPU.

    python benchmarks/machine_code.py

Compiles the kernels at the shapes of ConMamba-L and -S with Triton's own assembler, and issues each
inner loop's instructions in their order, with the waits that the assembler wrote beside them, for
1, 2 and 4 warps of a scheduler. Latencies are the usual ones of this architecture; what stands in a
loop counts as executed, also behind a branch. It tells what a kernel waits for, and which of two is
faster, before there is a GPU to measure on. It is no measurement.

Prints a row a loop: registers and bytes of spilled ones a thread, instructions, cycles of a pass
through the loop with so many warps, and the instructions that one warp waits for longest. The last
line is everything as JSON.
"""

import argparse
import collections
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from modules.command import plain_errors

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WARPS = 1, 2, 4
# Cycles until a result is there, of instructions that are waited for by a scoreboard.
LATENCY = {"SHFL": 24, "MUFU": 20, "LDG": 280, "LDL": 34, "LDS": 30} | dict.fromkeys(
    ("HMMA", "BAR", "STG", "STL", "STS"), 20
)
READ = 12  # cycles until a source register may be overwritten
# Units that take a warp's instruction every so many cycles, where that is more than one.
UNITS = {"MUFU": ("exponentials", 8)}
UNITS |= dict.fromkeys(("SHFL", "LDG", "STG", "LDL", "STL", "LDS", "STS"), ("memory", 4))
UNITS |= dict.fromkeys(
    ("FMNMX", "FSEL", "FSETP", "IADD3", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL",
     "SHF", "VIADD", "VIADDMNMX", "VIMNMX"), ("integers", 2)
)  # fmt: skip


@dataclass
class Instruction:
    """A line of machine code; the assembler's control bits say when the next may follow.

    stall: cycles until then; waits: numbers of the scoreboards to wait for; result, read: the
    scoreboards that tell of its result and of its sources, 7 for none.
    """

    text: str
    name: str
    stall: int
    waits: list
    result: int
    read: int


class NoDevice:
    """In place of Triton's driver: there is an H100, on which nothing is launched."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def compiled(call):
    """Compile what a call would launch: [(name, kernel)]"""
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append((f"{self.__module__.split('.')[-2]}: {self.__name__}", kernel.result()
                        if hasattr(kernel, "result") else kernel))  # fmt: skip
        return kernel

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return kernels


def disassemble(kernel):
    """-> instructions, {label: the index it stands before}, registers, bytes of spilled ones"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = tool("nvdisasm", "-c", "-hex", file.name)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", file.name))
    instructions, labels, text = [], {}, None
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif first := re.match(
            r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;?\s+/\* 0x[0-9a-f]{16} \*/", line
        ):
            text = first[1]
        elif (second := re.match(r"^\s+/\* 0x([0-9a-f]{16}) \*/", line)) and text is not None:
            control = int(second[1], 16) >> 41
            name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]
            waits = [b for b in range(6) if control >> 11 + b & 1]
            scoreboards = control >> 5 & 7, control >> 8 & 7
            instructions.append(Instruction(text, name, max(control & 15, 1), waits, *scoreboards))
            text = None
    return instructions, labels, int(usage[1]), int(usage[2])


def tool(name, *arguments):
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def inner_loops(instructions, labels, least=64):
    """Loops of at least so many instructions that hold none such: lists of instructions."""
    ends = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction.text)
        if target and labels[target[1]] <= i - least:
            ends.append((labels[target[1]], i))
    inner = [(a, z) for a, z in ends if not any(a <= b and y < z for b, y in ends)]
    return [instructions[a : z + 1] for a, z in inner]


def issue(loop, warps, passes=8):
    """-> cycles of a pass in the long run, {instruction: cycles that it waited} a pass"""
    free, last, waited = collections.Counter(), -1, collections.Counter()
    state = [{"at": 0, "ready": 0, "boards": [0] * 8, "ends": []} for _ in range(warps)]
    while unfinished := [w for w in state if len(w["ends"]) < passes]:
        choices = []
        for order, warp in enumerate(unfinished):
            next = loop[warp["at"]]
            unit = UNITS.get(next.name, (next.name, 0))[0]
            boards = [warp["boards"][b] for b in next.waits]
            time = max(warp["ready"], free[unit], last + 1, *boards)
            choices.append((time, len(warp["ends"]), warp["at"], order))
        time, *_, order = min(choices)
        warp, last = unfinished[order], time
        next = loop[warp["at"]]
        waited[next.text] += (time - warp["ready"]) / passes
        unit, busy = UNITS.get(next.name, (next.name, 0))
        free[unit] = time + busy
        boards = warp["boards"]
        boards[next.result] = max(boards[next.result], time + LATENCY.get(next.name, 24))
        boards[next.read] = max(boards[next.read], time + READ)
        warp["ready"], warp["at"] = time + next.stall, (warp["at"] + 1) % len(loop)
        if warp["at"] == 0:
            warp["ends"].append(time)
    ends = [max(warp["ends"][i] for warp in state) for i in range(passes)]
    return (ends[-1] - ends[0]) / (passes - 1), waited


def leaf(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def scan(both, batch, channels, frames, states=16, dtype=torch.bfloat16, padded=True, learns=True):
    """The scan in one direction, or both in one launch: -> y, with what a gradient of it asks for.

    padded: it is given lengths; learns: it keeps states for a backward pass.
    """
    from modules.ops.selective_scan import triton as backend

    lengths = torch.full((batch,), frames) if padded else None
    one = (2,) if both else ()
    u, dt = (leaf(*one, batch, frames, channels, dtype=dtype) for _ in range(2))
    B, C = (leaf(*one, batch, frames, states, dtype=dtype) for _ in range(2))
    A, D, bias = leaf(*one, channels, states), leaf(*one, channels), leaf(*one, channels)
    with torch.set_grad_enabled(learns):
        if both:
            return backend.bidirectional_scan(u, dt, A, B, C, D, bias, True, lengths)
        options = (None, bias, True, lengths, False, None, False)
        return backend.selective_scan(u, dt, A, B, C, D, *options)[0]


def forwards():
    """The scan's forward as each of its programs: both extents, padded or not, learning or not."""
    for batch, channels in ((32, 1024), (64, 288)):
        for padded, learns in itertools.product((True, False), repeat=2):
            scan(False, batch, channels, 400, padded=padded, learns=learns)


def convolution(batch, channels, frames, width=4, dtype=torch.bfloat16):
    """Both directions' convolution before the scans, and its gradient."""
    from modules.ops.causal_conv1d import triton as backend

    x = leaf(batch, frames, channels, dtype=dtype)
    weights, biases = leaf(2, channels, width), leaf(2, channels)
    lengths = torch.full((batch,), frames)
    backend.bidirectional_conv1d(x, weights, biases, lengths, "silu").sum().backward()


def paths(batch, frames, labels):
    """The sums over CTC's paths; a pass through their loop is four frames."""
    from modules.ops.ctc import triton as backend

    scores = torch.zeros(batch, frames, labels + 1)
    tokens = torch.zeros(batch, labels, dtype=torch.long)
    lengths, counts = torch.full((batch,), frames), torch.full((batch,), labels)
    backend.ctc(scores, tokens, lengths, counts, 0, needs_grad=False)


CALLS = {
    "scan": lambda: scan(False, 32, 1024, 400).sum().backward(),
    "both": lambda: scan(True, 32, 1024, 400).sum().backward(),
    "narrow": lambda: scan(True, 32, 288, 400).sum().backward(),
    "hour": lambda: scan(False, 1, 1024, 45000).sum().backward(),
    "forwards": forwards,
    "conv": lambda: convolution(32, 1024, 400),
    "ctc": lambda: paths(32, 400, 60),
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls", nargs="+", choices=CALLS, default=list(CALLS),
        help="the scan in one direction, in both, in both of ConMamba-S, of an hour in pieces; its "
        "forward, with what it is given and keeps and without; convolution; CTC's paths",
    )  # fmt: skip
    parser.add_argument("--latency", type=int, default=280, help="cycles until memory answers")
    parser.add_argument("--waits", type=int, default=3, help="how many waits to name a loop")
    return parser.parse_args()


def main():
    options = parse()
    LATENCY["LDG"] = options.latency
    driver.set_active(NoDevice())
    rows = []
    for call in options.calls:
        for name, kernel in compiled(CALLS[call]):
            instructions, labels, registers, spilled = disassemble(kernel)
            for loop in inner_loops(instructions, labels):
                cycles = [round(issue(loop, warps)[0]) for warps in WARPS]
                waits = issue(loop, 1)[1].most_common(options.waits)
                row = {"call": call, "kernel": name, "registers": registers, "spilled": spilled}
                row |= {"instructions": len(loop), "cycles": cycles}
                row["waits"] = {text: round(time) for text, time in waits}
                rows.append(row)
                shown = ", ".join(
                    f"{time} {text.split(',')[0]}" for text, time in row["waits"].items()
                )
                print(
                    f"{call:6s} {name:32s} {registers:3d} registers, {spilled:4d} bytes spilled: "
                    f"{len(loop):5d} instructions, cycles {cycles}; waits {shown}",
                    flush=True,
                )
    measure.print_report("machine_code", "cpu", rows, **vars(options))


if __name__ == "__main__":
    with plain_errors():
        main()
