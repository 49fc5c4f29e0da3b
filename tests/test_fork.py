"""A forked child computes by itself, with the bits of its parent, whatever the parent has computed.

OpenMP's threads do not survive a fork, and torch's own operators wait for them for ever in a child
whose parent has used them. Where attnfast is imported, they end before the fork and nobody waits.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from attnfast.backends import cpu

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or cpu.MISSING is not None,
    reason="forks, and needs the native library",
)

SETUP = """
import multiprocessing, os, signal, threading
import torch, attnfast

torch.manual_seed(0)
x = [torch.randn(2, 4, 300, 64, requires_grad=True) for _ in "qkv"]
upstream = torch.randn(2, 4, 300, 64)
caches = [torch.randn(4, 2, 3000, 64) for _ in "kv"]
lengths = torch.tensor([3000, 1, 700, 2000], dtype=torch.int32)

def results():
    out = attnfast.attention(*x, causal=True, backend="cpu")
    decoded = attnfast.decode_attention(upstream[:1, :, :4].transpose(0, 2), *caches, lengths)
    return [out.detach(), *torch.autograd.grad(out, x, upstream), decoded]

def digest(found):
    return [hash(y.numpy().tobytes()) for y in found]  # by no operator of torch

def child_of(parent_does):
    torch.set_num_threads(2)
    parent_does()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(120)  # ends what hangs
        found = digest(results()), len(os.listdir("/proc/self/task"))
        os.write(writer, repr(found).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child has ended with {status}"
    return eval(os.read(reader, 1 << 16))

def by_torch():
    torch.randn(600, 600) @ torch.randn(600, 600)
"""
PARENTS = {
    "has computed nothing": "lambda: None",
    "has used torch's operators": "by_torch",
    "has used the kernels": "results",
    "has used both": "lambda: (by_torch(), results())",
}


def run(code: str) -> list[str]:
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
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


@pytest.mark.parametrize("parent", PARENTS)
def test_a_child_has_its_parents_bits(parent: str) -> None:
    """By one thread after a call of ours; before one, by as many as torch says."""
    [threads] = run(f"""
found, threads = child_of({PARENTS[parent]})
assert found == digest(results())
print(threads)
""")
    assert (int(threads) == 1) == (parent in ("has used the kernels", "has used both"))


def test_torchs_operators_return_in_a_child_too() -> None:
    code = """
digest = lambda found: [1]
results = by_torch
assert child_of(by_torch)[0] == [1]
print("returned")
"""
    assert run(code) == ["returned"]


def test_a_child_of_another_thread_and_a_grandchild() -> None:
    code = """
found = []
thread = threading.Thread(target=lambda: found.append(child_of(results)[0]))
thread.start()
thread.join()
right = digest(results())
assert found == [right]
def again():
    assert child_of(results)[0] == right
results()
child = os.fork()
if not child:
    signal.alarm(240)
    again()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("same")
"""
    assert run(code) == ["same"]


def test_a_pool_and_the_workers_of_a_loader() -> None:
    code = """
torch.set_num_threads(2)
right = digest(results())
signal.alarm(240)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.starmap(digest_here, [()] * 4) == [right] * 4
loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
assert [[int(y) for y in row] for row in loader] == [right] * 4
print("same")
"""
    classes = """
def digest_here():
    return digest(results())

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return digest_here()
"""
    assert run(classes + code) == ["same"]
