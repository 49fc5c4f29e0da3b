"""Where memory runs out, in whichever allocation: a MemoryError, and the next call works.

An exception that leaves an OpenMP region ends the process, so every call here runs in one of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own memory"
)

LIMITED = """
import resource, sys
import torch, attnfast

torch.set_num_threads(2)
q = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
k = torch.randn(1, 2, 1 << 19, 64, dtype=torch.bfloat16, requires_grad=True)
out = attnfast.attention(q, k, k)  # starts the threads, which OpenMP could not do later
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()

def limit(mebibytes):
    soft = used + (mebibytes << 20) if mebibytes else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

for mebibytes in map(int, sys.argv[1:]):
    limit(mebibytes)
    try:
        torch.autograd.grad(out.sum(), (q, k), retain_graph=True)
        print("enough")
    except MemoryError as error:
        print(error)
limit(0)
assert torch.equal(attnfast.attention(q, k, k), out)
"""


def test_limited_address_space() -> None:
    """First the gradients do not fit, then the scratch does not: each says what and how much."""
    command = [sys.executable, "-c", LIMITED, "100", "300", "400", "600", "4000"]
    # A thread's own arena is 64 MiB of addresses, taken whenever the thread first asks for memory.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tensor, *scratch, enough = run.stdout.splitlines()
    assert tensor == "attention: no memory for a tensor: 128 MiB of shape (1, 2, 524288, 64)"
    for line in scratch:
        assert line.startswith("attention: no memory for the backward's scratch: ")
        assert line.endswith(" MiB for (B, H, T, S, D) = (1, 2, 8, 524288, 64)")
    assert enough == "enough"


INJECTED = """
import ctypes, hashlib, os, sys
import torch, attnfast

torch.set_num_threads(1)  # a forked child has no other
fail_at, left = ctypes.CDLL(None).fail_at, ctypes.CDLL(None).allocations_left

def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

def attention(dtype, **arguments):
    q, k = randn(2, 4, 150, 32, dtype=dtype), randn(2, 2, 300, 32, dtype=dtype)
    extra = dict(bias=randn(1, 1, 1, 300), sinks=randn(4)) if "bias" in arguments else {}
    return [q, k, *extra.values()], lambda: attnfast.attention(q, k, k, **arguments | extra)

def varlen(**arguments):
    q, ends = randn(90, 4, 32), torch.tensor([0, 50, 51, 80])
    call = lambda: attnfast.varlen_attention(q, q, q, ends, ends, 60, 60, **arguments)
    return [q], call

def decode(pages):
    q, cache = randn(3, 4, 1, 32).detach(), randn(3, 600, 2, 32).detach()
    lengths = torch.tensor([600, 1, 40])
    table = torch.tensor([[0], [1], [2]]) if pages else None
    k = cache if pages else cache.transpose(1, 2)
    return [], lambda: attnfast.decode_attention(q, k, k, lengths, page_table=table)

def layer():
    torch.manual_seed(0)
    module = attnfast.MultiheadAttention(64, 4, batch_first=True).eval()
    x = randn(2, 40, 64).detach()
    return [], torch.no_grad()(lambda: module(x, x, x, need_weights=False)[0])

ENTRIES = {
    "fp32": lambda: attention(torch.float32),
    "bf16": lambda: attention(torch.bfloat16, causal=True),
    "results": lambda: attention(torch.float16, return_weights=True, return_stats="received"),
    "bias": lambda: attention(torch.float32, bias=None, dropout_p=0.1,
                              dropout_seed=torch.tensor([1, 2])),
    "varlen": lambda: varlen(return_weights="mean"),
    "decode": lambda: decode(False),
    "pages": lambda: decode(True),
    "layer": layer,
}

def numbers(x):  # of the tensors in a result
    if isinstance(x, torch.Tensor):
        return x.detach().contiguous().view(torch.uint8).numpy().tobytes()
    parts = x if isinstance(x, (tuple, list)) else vars(x).values()
    return b"".join(numbers(part) for part in parts if part is not None)

def backward(leaves, call):
    results = call()
    out = results if isinstance(results, torch.Tensor) else results[0]
    return lambda: torch.autograd.grad(out.float().sin().sum(), leaves, retain_graph=True)

def tried(entry, with_gradients, n):
    \"\"\"In a child: what the n-th allocation's failure raised, and the next call's result.\"\"\"
    leaves, call = ENTRIES[entry]()
    call = backward(leaves, call) if with_gradients else call
    said = "nothing"
    fail_at(n)
    try:
        call()
    except MemoryError as error:
        said = f"MemoryError: {error}"
    except RuntimeError as error:
        said = f"RuntimeError: {error}"
    failed = n > 0 and left() == 0
    fail_at(0)
    return f"{failed} {hashlib.sha256(numbers(call())).hexdigest()} {said.splitlines()[0]}"

def child(*arguments):
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writes, tried(*arguments).encode())
        os._exit(0)
    os.close(writes)
    text = os.read(reads, 4096).decode()
    os.close(reads)
    return os.waitpid(pid, 0)[1], text

entry, with_gradients = sys.argv[1], sys.argv[2] == "backward"
status, text = child(entry, with_gradients, 0)
assert status == 0, status
right, n = text.split()[1], 0
while True:
    n += 1
    status, text = child(entry, with_gradients, n)
    assert status == 0, f"allocation {n}: exit status {status}"
    failed, result, said = text.split(" ", 2)
    assert result == right, f"allocation {n}: another result than before, after {said}"
    if failed == "False":
        assert said == "nothing", said
        break
    print(said)
"""


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets allocations fail."""
    library = tmp_path_factory.mktemp("preloaded") / "failing_allocations.so"
    source = Path(__file__).with_name("failing_allocations.cpp")
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    return library


@pytest.mark.parametrize(
    ("entry", "direction"),
    [
        *((name, "forward") for name in ("fp32", "bf16", "results", "varlen")),
        *((name, "forward") for name in ("decode", "pages", "layer")),
        *((name, "backward") for name in ("fp32", "bf16", "bias", "varlen")),
    ],
)
def test_every_allocation_may_fail(preloaded: Path, entry: str, direction: str) -> None:
    """Each in turn, in a child of its own, until there are no more."""
    run = subprocess.run(
        [sys.executable, "-c", INJECTED, entry, direction],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LD_PRELOAD": str(preloaded)},
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    ours = [line for line in said if "DefaultCPUAllocator" not in line]  # torch's own tensors
    assert len(ours) > 3
    for line in ours:
        assert line.startswith("MemoryError: ")
        assert "attention: no memory for " in line
    assert any("scratch: " in line for line in ours)
    assert any("tensor: " in line for line in ours)
