"""What ``explain`` says a call takes beside its tensors is what it takes: the heap is counted.

Every call is made in a fork of one process that has torch and attnfast and has computed nothing, so
that no scratch is left of another call.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnfast.backends import cpu
from attnfast.call import Inputs, Options
from attnfast.ops import cpu_isa

HEAP = r"""
#include <malloc.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t);
void *__libc_memalign(size_t, size_t), __libc_free(void*);

static long held, most;

static void* counted(void* block) {
  long now = __atomic_add_fetch(&held, malloc_usable_size(block), __ATOMIC_RELAXED);
  long before = __atomic_load_n(&most, __ATOMIC_RELAXED);
  while (now > before && !__atomic_compare_exchange_n(&most, &before, now, 0, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {}
  return block;
}
static void forget(void* block) {
  __atomic_sub_fetch(&held, malloc_usable_size(block), __ATOMIC_RELAXED);
}

void* malloc(size_t n) { return counted(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) { return counted(__libc_calloc(n, size)); }
void* realloc(void* old, size_t n) {
  forget(old);
  return counted(__libc_realloc(old, n));
}
void* aligned_alloc(size_t to, size_t n) { return counted(__libc_memalign(to, n)); }
void* memalign(size_t to, size_t n) { return counted(__libc_memalign(to, n)); }
int posix_memalign(void** block, size_t to, size_t n) {
  *block = counted(__libc_memalign(to, n));
  return *block ? 0 : 12;
}
void free(void* block) {
  forget(block);
  __libc_free(block);
}

long heap_start(void) { return most = held; }
long heap_most(void) { return most; }
"""

CALLS = {  # the function, its arguments, its options; what requires gradients is made by ``leaf``
    "forward": "attention, [of(1, 4, 300, 64), of(1, 2, 700, 64), of(1, 2, 700, 64)], {}",
    "lse returned": "attention, [of(1, 8, 1000, 16)] * 3, dict(return_lse=True)",
    "bf16": "attention, [of(1, 4, 700, 64, dtype=bf16)] * 3, {}",
    "backward": "attention, [leaf(1, 4, 300, 64) for _ in 'qkv'], dict(causal=True)",
    "backward, D not of vectors": "attention, [leaf(2, 4, 200, 70) for _ in 'qkv'], {}",
    "backward, bf16": "attention, [leaf(1, 2, 700, 64, dtype=bf16) for _ in 'qkv'], {}",
    "varlen backward": (
        "varlen_attention, [*(leaf(9000, 4, 32, dtype=bf16) for _ in 'qkv'), ends, ends, 100, 100],"
        " {}"
    ),
    "one long sequence": (
        "varlen_attention, [*(leaf(1500, 4, 32, dtype=bf16) for _ in 'qkv'), uneven, uneven, 900,"
        " 900], {}"
    ),
    "weights": "attention, [leaf(1, 8, 200, 64) for _ in 'qkv'], dict(return_weights='mean')",
    "statistics": "attention, [leaf(1, 8, 300, 64) for _ in 'qkv'], dict(return_stats='received')",
    "bias gradient": (
        "attention, [leaf(2, 8, 100, 64) for _ in 'qkv'], dict(bias=leaf(1, 8, 100, 100))"
    ),
    "chosen keys": (
        "attention, [leaf(1, 8, 300, 64), leaf(1, 2, 700, 64), leaf(1, 2, 700, 64)],"
        " dict(indices=torch.zeros(1, 300, 100, dtype=torch.int32))"
    ),
    "decode": (
        "decode_attention,"
        " [of(4, 32, 1, 128), of(4, 8, 4096, 128), of(4, 8, 4096, 128), lengths], {}"
    ),
    "decode, received": (
        "decode_attention, [of(4, 8, 2, 64), of(4, 8, 4096, 64), of(4, 8, 4096, 64), lengths],"
        " dict(return_received=True)"
    ),
    "one query": "attention, [leaf(4, 8, 1, 64), leaf(4, 8, 1000, 64), leaf(4, 8, 1000, 64)], {}",
}

MEASURE = r"""
import ctypes, dataclasses, json, os, re, sys
import torch
import attnfast
from attnfast import attention, decode_attention, varlen_attention

heap = ctypes.CDLL(None)
bf16 = torch.bfloat16
of = torch.empty
ends = torch.arange(0, 8001, 100, dtype=torch.int32)
uneven = torch.tensor([0, 900, 901, 1000], dtype=torch.int32)
lengths = torch.tensor([4096, 0, 700, 1], dtype=torch.int32)
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

def leaf(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)

def nbytes(tensors):
    return sum(x.nbytes for x in tensors)

def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, attnfast.AttentionStats):
        x = [getattr(x, field.name) for field in dataclasses.fields(x)]
    return [y for part in x or () for y in tensors_of(part)]

def results_of(function, args, options):
    results = tensors_of(function(*args, **options, backend="cpu"))
    return list({id(x): x for x in results}.values())

def said(function, args, options):
    # Bytes that explain says, forward and backward.
    text = attnfast.explain(*args, **options, backend="cpu")
    line = next(line for line in text.splitlines() if line.startswith("workspace"))
    sizes = re.findall(r"([\d.]+) (\w+) (?:for|back)ward", line)
    return [float(n) * UNITS[unit] for n, unit in sizes]

def forward(function, args, options):
    # Bytes that the forward takes beside its results, and norm where that is saved.
    start = heap.heap_start()
    results = results_of(function, args, options)
    saved = 8 * results[0].shape[:-1].numel() if any(map(is_leaf, args)) else 0
    return heap.heap_most() - start - nbytes(results) - saved

def backward(function, args, options):
    # Bytes that the backward takes beside its results, with no forward before it.
    def fake(ops, options, *inputs):
        return attnfast.ops.FAKES["fwd"](*inputs, *options)

    autograd = attnfast.autograd
    autograd.AttentionFunction.forward = autograd.with_saving(fake, autograd.save_attention)
    results = results_of(function, args, options)
    leaves = [x for x in (*args, *options.values()) if is_leaf(x)]
    upstream = torch.zeros_like(results[0])
    start = heap.heap_start()
    gradients = torch.autograd.grad(results[0], leaves, upstream)
    return heap.heap_most() - start - nbytes(gradients)

def is_leaf(x):
    return isinstance(x, torch.Tensor) and x.requires_grad

heap.heap_start.restype = heap.heap_most.restype = ctypes.c_long
x = torch.zeros(2, requires_grad=True)
torch.autograd.grad(x.sin(), x, torch.zeros(2))  # imports a large library when first called
for name, call in json.loads(sys.argv[1]).items():
    for task in (said, forward, backward) if "leaf" in call else (said, forward):
        if not os.fork():
            torch.set_num_threads(2)
            print(json.dumps([name, task(*eval(call))]), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ or not shutil.which("cc"),
    reason="counts the heap of glibc, by a library that cc compiles",
)
@pytest.mark.skipif(cpu.MISSING is not None, reason="no native library")
def test_explain_says_what_a_call_takes(tmp_path: Path) -> None:
    source, library = tmp_path / "heap.c", tmp_path / "heap.so"
    source.write_text(HEAP)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(CALLS)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, list[Any]] = {name: [] for name in CALLS}
    for line in process.stdout.splitlines():
        name, value = json.loads(line)
        found[name].append(value)
    for name, (said, *taken) in found.items():
        assert len(said) == len(taken) > 0, (name, process.stderr)
        for claim, size in zip(said, taken, strict=True):
            assert abs(claim - size) < 0.01 * claim + (32 << 10), (name, said, taken)


@pytest.mark.skipif(cpu.MISSING is not None, reason="no native library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_forward_of_a_long_call_takes_4_mb_a_thread(dtype: str) -> None:
    """Of 65,536 tokens; but for planes on AMX's tiles, which are made for whole heads."""
    if dtype != "bfloat16" and cpu_isa() in ("amx", "tiles16"):
        pytest.skip("packs whole heads in planes")
    x = torch.empty(1, 1, 1 << 16, 64, dtype=getattr(torch, dtype))
    arguments = (*Inputs(x, x, x), *Options(0.125, causal=True), False)
    forward, _ = torch.ops.attnfast.cpu_workspace(*arguments)
    assert 0 < forward <= 4e6 * torch.get_num_threads()
