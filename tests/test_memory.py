"""Memory: outputs, lse and tiles per thread; nothing that grows with T x S.

Each measurement is a process of its own, since the peak of resident memory never falls.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETUP = """
import resource, sys
import torch
import attnfast

torch.set_num_threads(2)
N, D = 8192, 64

def peak():  # bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def measure(q, k, v, **arguments):
    small = [x[..., :70, :].detach().requires_grad_(x.requires_grad) for x in (q, k, v)]
    warm = attnfast.attention(*small, causal=True, backend="cpu")
    if warm.requires_grad:
        warm.sum().backward()
    before = peak()
    results = attnfast.attention(q, k, v, backend="cpu", **arguments)
    out = results[0] if isinstance(results, tuple) else results
    if out.requires_grad:
        loss = out.sum()
        if isinstance(results, tuple):
            loss = loss + sum(x.sum() for x in (results[1].lse, results[1].entropy))
        loss.backward()
    print(peak() - before)

def leaves(dtype=torch.float32):
    return [torch.randn(1, 1, N, D, dtype=dtype, requires_grad=True) for _ in "qkv"]
"""
MATRIX = 8192 * 8192 * 4  # the T x S scores of one head in fp32: 256 MiB; q takes 2 MiB

RUNS = {
    "bf16": "measure(*leaves(torch.bfloat16), causal=True)",
    "dropout": "measure(*leaves(), dropout_p=0.1)",
    "mask, bias, ALiBi, sinks": (
        "measure(*leaves(), causal=True, mask=torch.rand(N) < 0.9, "
        "bias=torch.randn(N, 1, requires_grad=True), alibi_slopes=torch.rand(1), "
        "sinks=torch.randn(1, requires_grad=True))"
    ),
    "expanded mask and bias": (
        "measure(*leaves(), mask=(torch.rand(N) < 0.9).expand(N, N), "
        "bias=torch.randn(N).expand(1, 1, N, N))"
    ),
    "blocks": (
        "measure(*leaves(), mask=attnfast.BlockMask.from_documents(torch.arange(N) // 512))"
    ),
    "statistics": "measure(*leaves(), causal=True, return_stats='received')",
}


def growth(run: str) -> int:
    """By how many bytes the process's peak grew during a call."""
    process = subprocess.run(
        [sys.executable, "-c", SETUP + run], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


sanitized = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own memory"
)


@sanitized
@pytest.mark.parametrize("name", RUNS)
def test_no_matrix_of_scores(name: str) -> None:
    """With T = S = 8192, out, lse, statistics and all gradients are a thirtieth of the scores."""
    assert growth(RUNS[name]) < MATRIX / 16


@sanitized
@pytest.mark.parametrize("cells", [(0, 512, 512), (1, 1, 8192), (2, 32, 66)], ids=str)
def test_pooling_holds_cells_alone(cells: tuple[int, int, int]) -> None:
    run = f"""
from attnfast.call import Inputs, Options
from attnfast.pooled import pooled
def pool(n):
    inputs = Inputs(*(torch.randn(1, 1, n, D) for _ in "qkv"))
    return pooled("attention", inputs, Options(0.125, causal=True), *{cells}, "cpu")
pool(70)
before = peak()
pool(N)
print(peak() - before)
"""
    assert growth(run) < MATRIX / 16


@sanitized
@pytest.mark.parametrize("weights", ["'mean'", "True"])
def test_weights_are_held_once(weights: str) -> None:
    """Averaged over eight heads they take a T x S matrix, not eight; a gradient doubles that."""
    run = f"""
q, k, v = (torch.randn(1, 8, 2048, D, requires_grad=True) for _ in "qkv")
out, weights = attnfast.attention(q[..., :8, :], k, v, return_weights={weights}, backend="cpu")
(out.sum() + weights.sum()).backward()
before = peak()
out, weights = attnfast.attention(q, k, v, return_weights={weights}, backend="cpu")
(out.sum() + (weights * weights.detach()).sum()).backward()
print(peak() - before)
"""
    heads = 1 if weights == "'mean'" else 8
    scores = 2048 * 2048 * 4
    assert growth(run) < (4 * heads + 1) * scores


@sanitized
def test_strided_inputs_are_not_copied() -> None:
    """Of a packed (B, T, 3, H, D) projection: a copy of q, k or v would be as large as out."""
    run = """
packed = torch.randn(1, 16384, 3, 8, D)
q, k, v = packed.permute(2, 0, 3, 1, 4)
measure(q, k, v, window=(64, 64))
"""
    out = 16384 * 8 * 64 * 4
    assert growth(run) < 1.6 * out
