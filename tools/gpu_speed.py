"""Write the tables of docs/gpu-speed.md: instructions beside rivals', and the speed they foretell.

    python tools/gpu_speed.py            write them
    python tools/gpu_speed.py --check    exit code 1 if they are not as the tables of resources say

Ours are those of docs/cuda-resources.csv and of the newest of docs/triton-resources; the rivals'
were counted in the same way and are constants here, with what has been published of their speed.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import aot_docs  # noqa: E402

PAGE = Path("docs") / "gpu-speed.md"
CUDA_TABLE = Path("docs") / "cuda-resources.csv"
SCORES = 64 * 64  # what CUDA's instructions are for; Triton's are for 1,024
SCHEDULERS = 4  # of an SM, each issues an instruction a cycle
FORWARD, BACKWARD = 2, 5  # products

# FlashAttention-2, compiled by nvcc 13.0 for sm_80: causal bf16, the turn of its loop without
# masks. Triton's tutorial 06, by Triton 3.9 in the best of its configurations.
FLASH_2 = {("fwd", 64): 1128, ("fwd", 128): 1766, ("bwd", 64): 2564, ("bwd", 128): 3908}
TUTORIAL = {
    ("sm_80", "fwd", 64): 349,
    ("sm_80", "fwd", 128): 528,
    ("sm_90", "fwd", 64): 237,
    ("sm_90", "fwd", 128): 261,
    ("sm_90", "dq", 64): 279,
    ("sm_90", "dkdv", 64): 330,
    ("sm_100", "fwd", 64): 246,
    ("sm_100", "fwd", 128): 338,
}
CUDA_KERNELS = {"fwd": "attention_fwd<bf16, {}, plain>", "bwd": "attention_bwd_fused<bf16, {}>"}


class Machine(NamedTuple):
    """A GPU as its maker describes it."""

    name: str
    sms: int
    clock: float  # GHz
    rate: int  # multiply-adds of 16 bits into fp32, per SM and cycle


A100 = Machine("A100 SXM", 108, 1.41, 1024)
RTX_4090 = Machine("RTX 4090", 128, 2.52, 256)
H100 = Machine("H100 SXM, H200", 132, 1.83, 2048)


class Published(NamedTuple):
    """What a paper measured, without a mask and for the longest sequences."""

    machine: Machine
    kernel: str
    D: int
    tflops: float


# Dao 2023, section 4.1, of A100; Shah et al. 2024, figures 5 and 6, of H100.
FLASH_2_SPEEDS = (
    Published(A100, "fwd", 128, 0.73 * 312),
    Published(A100, "bwd", 128, 0.63 * 312),
    Published(H100, "fwd", 64, 324),
    Published(H100, "fwd", 128, 370),
    Published(H100, "bwd", 128, 322),
)
TUTORIAL_SPEEDS = (Published(H100, "fwd", 64, 403), Published(H100, "fwd", 128, 395))


def flop(kernel: str, D: int) -> int:
    """Of 64 x 64 scores."""
    return 2 * SCORES * D * (FORWARD if kernel == "fwd" else BACKWARD)


def cycles_at(speed: Published) -> float:
    """Cycles that an SM takes for 64 x 64 scores at a published speed."""
    per_cycle = speed.tflops * 1e3 / (speed.machine.sms * speed.machine.clock)
    return flop(speed.kernel, speed.D) / per_cycle


def tflops(machine: Machine, kernel: str, D: int, cycles: float) -> float:
    """The speed at which an SM takes so many cycles for 64 x 64 scores."""
    return flop(kernel, D) / cycles * machine.sms * machine.clock / 1e3


def other_cycles(kernel: str, D: int, instructions: int) -> float:
    """Cycles in which the schedulers issue what is no `m16n8k16`."""
    products = flop(kernel, D) / (2 * 16 * 8 * 16)
    return (instructions - products) / SCHEDULERS


class Model(NamedTuple):
    """Cycles of 64 x 64 scores: those of the tensor cores, and of the rest so many times."""

    rate: float  # multiply-adds per cycle that `mma` has
    forward: float
    backward: float

    def cycles(self, kernel: str, D: int, instructions: int) -> float:
        """As the model has them."""
        rest = self.forward if kernel == "fwd" else self.backward
        return flop(kernel, D) / 2 / self.rate + rest * other_cycles(kernel, D, instructions)


def fitted(machine: Machine, rate: float) -> tuple[float, float]:
    """The factors of forward and backward that give FlashAttention-2's speed at D = 128."""
    found = []
    for kernel in ("fwd", "bwd"):
        speed = next(x for x in FLASH_2_SPEEDS if x[:3] == (machine, kernel, 128))
        tensor = flop(kernel, 128) / 2 / rate
        rest = other_cycles(kernel, 128, FLASH_2[kernel, 128])
        found.append((cycles_at(speed) - tensor) / rest)
    return found[0], found[1]


def hopper_rate() -> float:
    """How many multiply-adds a cycle `mma` has there, by the forward's speed at two head dims.

    Twice D doubles the tensor cores' cycles and not the rest: two equations.
    """
    speeds = [cycles_at(x) for x in FLASH_2_SPEEDS if x.machine is H100 and x.kernel == "fwd"]
    rest = [other_cycles("fwd", D, FLASH_2["fwd", D]) for D in (64, 128)]
    factor = (2 * speeds[0] - speeds[1]) / (2 * rest[0] - rest[1])
    return flop("fwd", 64) / 2 / (speeds[0] - factor * rest[0])


def models() -> dict[Machine, Model]:
    """By machine; the 4090, of which nothing is published, has the A100's factors."""
    ampere = fitted(A100, A100.rate)
    rate = hopper_rate()
    return {
        A100: Model(A100.rate, *ampere),
        RTX_4090: Model(RTX_4090.rate, *ampere),
        H100: Model(rate, *fitted(H100, rate)),
    }


def cuda_counts(root: Path) -> dict[tuple[str, str, int], int]:
    """Warp instructions for 64 x 64 scores, by architecture, kernel and D."""
    with (root / CUDA_TABLE).open() as file:
        rows = {(row["architecture"], row["kernel"]): row["total"] for row in csv.DictReader(file)}
    return {
        (arch, kernel, D): int(rows[arch, CUDA_KERNELS[kernel].format(D)])
        for arch in ("sm_80", "sm_90")
        for kernel, D in FLASH_2
    }


def triton_counts(root: Path) -> dict[tuple[str, str, int, str], int]:
    """Issue slots for 1,024 scores, by architecture, pass, D and variant."""
    rows = next(iter(aot_docs.read(root).values()))
    return {
        (row["arch"], row["name"], int(row["D"]), row["variant"]): int(row["loop_total"])
        for row in rows
        if row["loop_total"] and row["dtype"] == "bfloat16"
    }


def cuda_table(root: Path) -> str:
    """CUDA's loops beside FlashAttention-2's."""
    ours = cuda_counts(root)
    lines = []
    for (kernel, D), theirs in FLASH_2.items():
        own = ours["sm_80", kernel, D]
        lines.append([f"{kernel}, {D}", f"{own:,}", f"{theirs:,}", f"{own / theirs:.2f}"])
    return aot_docs.markdown(["pass, D", "attnfast", "FlashAttention-2", "ratio"], lines)


def triton_table(root: Path) -> str:
    """Triton's loops, plain and with one option, beside the tutorial's."""
    ours = triton_counts(root)
    variants = ("plain", "causal", "padded", "masked", "biased")
    lines = []
    for arch, name, D in dict.fromkeys(key[:3] for key in ours):
        found = [ours.get((arch, name, D, variant)) for variant in variants]
        if None in found and name != "gluon":
            continue
        theirs = TUTORIAL.get((arch, name, D))
        line = [f"{arch}, {name}, {D}", *("-" if x is None else f"{x:,}" for x in found)]
        lines.append([*line, "-" if theirs is None else f"{theirs:,}"])
    return aot_docs.markdown(["", *variants, "tutorial, plain"], lines)


def estimates(root: Path) -> str:
    """TFLOP/s of the CUDA kernels by the model, and FlashAttention-2's by the same."""
    ours, by_machine = cuda_counts(root), models()
    lines = []
    for kernel, D in FLASH_2:
        line = [f"{kernel}, {D}"]
        for machine, model in by_machine.items():
            own = ours["sm_90" if machine is H100 else "sm_80", kernel, D]
            for count in (own, FLASH_2[kernel, D]):
                line.append(f"{tflops(machine, kernel, D, model.cycles(kernel, D, count)):.0f}")
        lines.append(line)
    header = [f"{m.name}, {who}" for m in by_machine for who in ("attnfast", "FlashAttention-2")]
    return aot_docs.markdown(["pass, D", *header], lines)


def triton_estimates(root: Path) -> str:
    """TFLOP/s of Triton's forward on Hopper, by the factor that the tutorial's speed gives."""
    ours = triton_counts(root)
    lines = []
    for speed in TUTORIAL_SPEEDS:
        tensor = flop("fwd", speed.D) / 2 / H100.rate
        factor = (cycles_at(speed) - tensor) / TUTORIAL["sm_90", "fwd", speed.D]
        own = tensor + factor * ours["sm_90", "fwd", speed.D, "plain"]
        numbers = (tflops(H100, "fwd", speed.D, own), speed.tflops)
        lines.append([f"fwd, {speed.D}", f"{factor:.2f}", *(f"{x:.0f}" for x in numbers)])
    return aot_docs.markdown(["pass, D", "factor", "attnfast", "tutorial, measured"], lines)


def factors() -> str:
    """What the model was fitted to."""
    lines = [
        [machine.name, f"{model.rate:.0f}", f"{model.forward:.2f}", f"{model.backward:.2f}"]
        for machine, model in models().items()
    ]
    return aot_docs.markdown(["", "rate", "factor, forward", "factor, backward"], lines)


def text(root: Path = ROOT) -> str:
    """What stands between the marks."""
    parts = {
        "CUDA: warp instructions for 64 x 64 scores on sm_80": cuda_table(root),
        "Triton: issue slots for 1,024 scores, bf16": triton_table(root),
        "The model's numbers": factors(),
        "CUDA: TFLOP/s that the model gives, long sequences without a mask": estimates(root),
        "Triton's forward on H100: TFLOP/s that the model gives": triton_estimates(root),
    }
    return "\n" + "\n".join(f"{title}:\n\n{table}" for title, table in parts.items()) + "\n"


if __name__ == "__main__":
    sys.exit(aot_docs.main(page=PAGE, text=text))
