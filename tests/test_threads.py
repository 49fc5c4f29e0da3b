"""Threads: they are torch's, none is idle while others have much to do, and none works for nothing.

In processes of their own, where idle threads sleep instead of spinning, so that CPU time is work.
What other processes do meanwhile does not count: a thread that waits for a core has work to do.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from attnfast.backends import cpu

pytestmark = [
    pytest.mark.skipif(
        not os.path.exists("/proc/self/schedstat") or "asan" in os.environ.get("LD_PRELOAD", ""),
        reason="reads what Linux counts of each thread",
    ),
    pytest.mark.skipif(cpu.MISSING is not None, reason="no native library"),
]

SETUP = """
import os, threading, time
from pathlib import Path
import torch, attnfast

torch.manual_seed(0)

def tasks():
    return len(os.listdir("/proc/self/task"))

def waited():
    stats = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(x.read_text().split()[1]) for x in stats) / 1e9

def times(call, threads):
    # CPU seconds, and the share of the threads' time in which they had something to do.
    torch.set_num_threads(threads)
    before = waited(), time.process_time(), time.perf_counter()
    call()
    wall, cpu = time.perf_counter() - before[2], time.process_time() - before[1]
    return cpu, (cpu + waited() - before[0]) / wall / threads

def packed(H, H_kv, lengths, causal, dtype=torch.float32):
    total, longest = sum(lengths), max(lengths)
    q, k, v = (torch.randn(total, h, 64, dtype=dtype, requires_grad=True) for h in (H, H_kv, H_kv))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    def call():
        return attnfast.varlen_attention(q, k, v, ends, ends, longest, longest, causal=causal)
    out = call()
    upstream = torch.randn_like(out)
    def backward():
        torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    def forward():
        with torch.no_grad():
            call()
    return forward, backward

def cached(H, H_kv, lengths, dtype=torch.float32):
    q = torch.randn(len(lengths), H, 1, 128, dtype=dtype)
    k, v = (torch.randn(len(lengths), H_kv, max(lengths), 128, dtype=dtype) for _ in "kv")
    lengths = torch.tensor(lengths).int()
    return lambda: [attnfast.decode_attention(q, k, v, lengths) for _ in range(4)]

def judge(name, call):
    call()
    for _ in range(20):  # the best of some: what disturbs can only add
        alone = min(times(call, 1)[0] for _ in range(2))
        cpu, busy = times(call, 2)
        print(name, round(busy, 3), round(cpu / alone, 3), flush=True)
        if busy >= 0.85 and cpu < MOST * alone:
            return
    raise SystemExit(f"{name}: busy {busy:.2f}, work {cpu / alone:.2f} times one thread's")

MOST = 1.25
RAGGED = [4096] + [32] * 200
"""


def run(code: str) -> list[str]:
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environ.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_heavy_sequence_beside_many_short_ones(dtype: str) -> None:
    """First and last, causal or not, also of one head: at least 85% of two threads."""
    run(f"""
dtype = torch.{dtype}
for H, H_kv in ((1, 1), (4, 1), (3, 3)):
    for causal in (True, False):
        forward, backward = packed(H, H_kv, RAGGED[:: 1 if causal else -1], causal, dtype)
        judge(f"forward {{H}}:{{H_kv}}", forward)
        judge(f"backward {{H}}:{{H_kv}}", backward)
""")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal(dtype: str) -> None:
    run(f"""
for H, H_kv in ((1, 1), (3, 3)):
    for name, call in zip(("forward", "backward"), packed(H, H_kv, [4096], True, torch.{dtype})):
        judge(f"{{name}} {{H}}:{{H_kv}}", call)
""")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_with_ragged_lengths(dtype: str) -> None:
    """Reading is what it does: two threads wait for memory where one does not, and work longer."""
    run(f"""
MOST = 2.5
for H, H_kv in ((1, 1), (8, 1), (8, 8)):
    for lengths in ([16384] + [100] * 63, [100] * 31 + [16384 // H_kv]):
        judge(f"decoding {{H}}:{{H_kv}}", cached(H, H_kv, lengths, torch.{dtype}))
""")


def test_the_threads_are_torchs() -> None:
    """After torch has its pool, calls begin no thread, from Python's threads neither."""
    found = run("""
x = torch.randn(2, 4, 600, 64, requires_grad=True)

def by_torch():
    torch.mm(x[0, 0], x[0, 0].T).exp()
    (torch.randn(1 << 20) + 1).sum()

def ours():
    out = attnfast.attention(x, x, x, causal=True, backend="cpu")
    torch.autograd.grad(out.sum(), x)

def count(meet):
    meet.wait()
    if threading.current_thread().name == "0":
        counts.append(tasks())
    meet.wait()

def both(meet):
    by_torch()
    count(meet)
    ours()
    count(meet)

for number in (1, 2, 4):
    torch.set_num_threads(number)
    by_torch()
    before = tasks()
    ours()
    print(number, tasks() - before)
counts, meet = [], threading.Barrier(8)
callers = [threading.Thread(target=both, args=(meet,), name=str(i)) for i in range(8)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
print(counts[1] - counts[0])
""")
    assert found == ["1 0", "2 0", "4 0", "0"]


def test_one_thread_is_one() -> None:
    """torch.set_num_threads(1) holds after calls by more: the others do nothing."""
    [others] = run("""
x = torch.randn(2, 4, 1500, 64, requires_grad=True)
def call():
    out = attnfast.attention(x, x, x, backend="cpu")
    torch.autograd.grad(out.sum(), x)
torch.set_num_threads(2)
call()
torch.set_num_threads(1)
time.sleep(0.2)
process, mine = time.process_time(), time.thread_time()
call()
others = time.process_time() - process - (time.thread_time() - mine)
print(others / (time.thread_time() - mine))
""")
    assert float(others) < 0.02
