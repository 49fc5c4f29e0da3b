"""Compile every entry of the Triton tile tables for every architecture, without a GPU.

    python -m tools.aot                    compile with the installed Triton, compare with the table
    python -m tools.aot --write            and write the table, docs/triton-resources/VERSION.csv
    python -m tools.aot --write --missing  only what the table lacks, or has of older sources
    python -m tools.aot --sample 2/8       the second of eight parts, the same ones every time
    python -m tools.aot --arch sm_90 --pass fwd dq --head-dim 128

A table is written as kernels are compiled, so a run that is killed goes on with ``--missing``;
tools/aot_docs.py then writes docs/triton.md's tables.
Kernels are made by the launchers themselves, on a driver that names the target and has no device.
Held for each: shared memory within the hardware's limit; matrix instructions in 16-bit kernels;
no spills in the default entries for D <= 128; no wait for each wgmma; and no more registers, spills
or shared memory than the committed table says, nor 2% more instructions in the loop.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import triton
from attnfast.kernels import (
    arguments,
    attention_bias,
    attention_bwd,
    attention_decode,
    attention_fwd,
    attention_fwd_gluon,
    attention_indexed_bwd,
    attention_indexed_fwd,
    attention_pooled,
    attention_weights,
    configs,
    indexed_lists,
    key_ends,
)
from attnfast.kernels.launch import Launch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnfast.call import BY_DISTANCE, DISTANCES, MEAN, Inputs, Options, Pooling, Upstream
from tools import cuda_resources, device_code, device_loops

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "docs" / "triton-resources"
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
COUNTED = ("sm_80", "sm_90", "sm_100")  # architectures for which single options are compiled too
BLOCKED = (*COUNTED, "gfx942")  # and those for which a block mask is
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|OMMA|v_mfma_\w+|v_wmma_\w+)\b")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SINGLE = ("padded", "masked", "biased")  # options whose tiles the loop loads
VARIANTS = ("plain", "causal", *SINGLE, "blocks", "everything", "ones")
UNTILED = ("combine", "dsinks", "ends", "indexed_sums")  # kernels without products
EVERYTHING_FOR = (2, 128)  # bytes of an element and head dim also compiled with every option
WRITE_EVERY = 10  # kernels
GROWTH = 1.02  # of a loop's issue slots
MODULES = {
    name: importlib.import_module(f"attnfast.kernels.{file}")
    for name, (file, *_) in device_code.KERNELS.items()
}


class Entry(NamedTuple):
    """One kernel to compile: what `configs.choose` is asked, and the options of the call."""

    arch: str
    name: str
    size: int
    D: int
    variant: str


class Resources(NamedTuple):
    """What a compiled kernel needs."""

    arch: str
    name: str
    dtype: str
    D: int
    variant: str
    tile: str
    warps: int
    stages: int
    registers: int  # per thread
    spills: int  # bytes of stack a thread; on AMD, spilled registers
    shared: int  # bytes
    matrix: str  # the matrix instruction
    source: str  # `fingerprint` of what it was compiled from
    blocks: int  # that an SM can have at a time; 0: not known
    products: int  # matrix instructions in a turn of the loop
    waits: int  # for wgmma, in a turn
    loop: tuple[int, ...]  # issue slots for 1,024 scores as device_loops.NAMES; () without one


LOOP = tuple(f"loop_{name}" for name in device_loops.NAMES)  # columns of Resources.loop
Table = dict[tuple[str, ...], Resources]  # by `key`


class NoDevice:
    """A Triton driver that has a target and nothing else."""

    def __init__(self, arch: str) -> None:
        name = arch.removeprefix("sm_")
        self.target = (
            GPUTarget("cuda", int(name), 32) if name != arch else GPUTarget("hip", arch, 64)
        )

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Device 0, which is never asked for anything."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def entries() -> Iterator[Entry]:
    """Every entry of every table, plain and causal; the variant with all options for some."""
    for arch in ARCHITECTURES:
        for name in (*configs.PASSES, *configs.INDEXED):
            for size in DTYPES:
                for D in configs.HEAD_DIMS:
                    for variant in variants(arch, name, size, D):
                        yield Entry(arch, name, size, D, variant)
    for name in (
        *configs.PASSES,
        *configs.INDEXED,
        *UNTILED,
    ):  # where sizes are 1, Triton takes them for constants
        yield Entry("sm_90", name, 2, 1, "ones")
    for arch in ARCHITECTURES:
        for name in UNTILED:
            yield Entry(arch, name, 2, 128, "everything" if name != "ends" else "padded")
    for D in attention_fwd_gluon.TILES:
        for variant in VARIANTS[:2]:
            yield Entry("sm_90", "gluon", 2, D, variant)


def variants(arch: str, name: str, size: int, D: int) -> tuple[str, ...]:
    """Also the causal kernels of the passes that training lives on, and options for some."""
    found = ["plain"]
    if name in ("fwd", "dq", "dkdv") and size == 2 and D <= 128:
        found += ["causal", *(SINGLE if arch in COUNTED else ())]
        found += ["blocks"] if arch in BLOCKED else []
    if (size, D) == EVERYTHING_FOR:
        found.append("everything")
    return tuple(found)


def job(entry: Entry) -> Launch:
    """The launch that a call of this kind makes."""
    everything = entry.variant in ("everything", "ones")
    B, H, H_kv, T, D = (2, 4, 2, 512, entry.D) if entry.variant != "ones" else (1, 1, 1, 1, 1)
    dtype = DTYPES[entry.size]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v = empty(B, H, T, D), empty(B, H_kv, T, D), empty(B, H_kv, T, D)
    inputs, options = Inputs(q, k, v), Options(D**-0.5, causal=entry.variant == "causal")
    if everything:
        inputs = inputs._replace(
            mask=empty(B, 1, T, T, dtype=torch.bool),
            bias=empty(1, H, T, T),
            alibi_slopes=empty(1, H, dtype=torch.float32),
            sinks=empty(H, dtype=torch.float32),
            align=empty(B, dtype=torch.int32),
            dropout_seed=empty(2, dtype=torch.int64),
        )
        options = options._replace(
            window_left=64, window_right=64, softcap=30.0, dropout_p=0.1, stats=2, weights=2
        )
    if entry.variant == "padded":
        inputs = inputs._replace(mask=empty(B, 1, 1, T, dtype=torch.bool).expand(B, 1, T, T))
    if entry.variant == "masked":
        inputs = inputs._replace(mask=empty(B, 1, T, T, dtype=torch.bool))
    if entry.variant == "biased":
        inputs = inputs._replace(bias=empty(1, H, T, T))
    if entry.variant == "blocks":
        inputs = inputs._replace(
            block_starts=empty(1, H, 18, dtype=torch.int32),
            block_index=empty(4, 16, dtype=torch.int32),
            block_bits=empty(8, 128, 4, dtype=torch.int32),
        )
    if entry.name == "dbias" and not everything:
        inputs = inputs._replace(bias=empty(1, H, T, T))
    if entry.name.startswith("indexed"):
        return indexed_job(entry, inputs, options)
    call = arguments.gather(inputs, options, configs.l2_bytes(entry.arch))
    call = key_ends.with_key_ends(call)
    if entry.name == "ends":
        return key_ends.key_ends_launches(call)[0]
    if entry.name == "gluon":
        return attention_fwd_gluon.hopper_launch(call, attention_fwd.results(inputs, options))
    if entry.name == "fwd":
        return attention_fwd.forward_launch(
            call, attention_fwd.results(inputs, options), entry.arch
        )
    rows, norm = empty(B, H, T, dtype=torch.float32), empty(2, B, H, T, dtype=torch.float32)
    if entry.name == "weights":
        return attention_weights.weights_launch(call, empty(B, H, T, T), norm, False, entry.arch)
    if entry.name == "received":
        received = empty(B, H, T, dtype=torch.float32)
        return attention_weights.received_launch(call, received, norm, entry.arch)
    if entry.name in ("cells", "distances"):
        cells, kind, columns = T // 64, MEAN, T // 64
        if entry.name == "distances":
            kind, columns = BY_DISTANCE, DISTANCES
        tokens = empty(B, T, dtype=torch.int32) if everything else None
        pooling = Pooling(norm, tokens, tokens, kind, max(cells, 1), max(columns, 1))
        to = empty(B, H, *pooling[-2:], dtype=torch.float32)
        return attention_pooled.pooled_launch(call, pooling, to, entry.arch)
    if entry.name in ("decode", "combine"):
        lengths, table = empty(B, dtype=torch.int32), None
        if everything:
            table = empty(B, 8, dtype=torch.int32)
        jobs = attention_decode.decode_launches(call, lengths, table, entry.arch)
        return jobs[("decode", "combine").index(entry.name)]
    upstream = Upstream.plain(q, q, norm)
    if everything:
        upstream = upstream._replace(grad_lse=rows, grad_entropy=rows, entropy=rows)
    if everything or entry.name == "rows":  # which has products only then
        upstream = upstream._replace(grad_weights=empty(B, H, T, T))
    given = attention_bwd.given(upstream, False)
    if entry.name == "dbias":
        return attention_bias.bias_launch(call, given, entry.arch)
    if entry.name == "dsinks":
        dsinks = empty(H, dtype=torch.float32)
        return attention_bias.sink_launch(call, given, dsinks, entry.arch)
    jobs = attention_bwd.backward_launches(call, given, attention_bwd.results(inputs), entry.arch)
    return jobs[("rows", "dq", "dkdv").index(entry.name)]


def indexed_job(entry: Entry, inputs: Inputs, options: Options) -> Launch:
    """The launch over chosen keys, of as many query heads to a key head as a tile has rows."""
    q, k, v = inputs.q, inputs.k[:, :1], inputs.v[:, :1]
    H = 64 if entry.variant != "ones" else 1
    q = q.new_empty(q.shape[0], H, *q.shape[2:])
    sinks = None if inputs.sinks is None else inputs.sinks.new_empty(H)
    inputs = Inputs(q, k, v, sinks=sinks, align=inputs.align)
    options = options._replace(dropout_p=0.0, weights=0, stats=min(options.stats, 1))
    B, _, T, D = q.shape

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    call = arguments.gather(inputs, options, configs.l2_bytes(entry.arch))
    lists = indexed_lists.Lists(ints(B, 1, T, T), ints(B, 1, T), 1, T)
    if entry.name == "indexed_fwd":
        to = attention_fwd.results(inputs, options)
        return attention_indexed_fwd.indexed_fwd_launch(call, lists, to, entry.arch)
    norm = torch.empty(2, B, H, T)
    upstream = Upstream.plain(q, q, norm)
    if entry.variant in ("everything", "ones"):
        upstream = upstream._replace(grad_lse=norm[0], grad_entropy=norm[0], entropy=norm[0])
    given = attention_bwd.given(upstream, False)
    if entry.name == "indexed_dq":
        to = attention_bwd.results(inputs)
        return attention_indexed_bwd.dq_launch(call, lists, given, to, entry.arch)
    terms = attention_indexed_bwd.new_terms(call, T, slice(0, min(T, 16)))
    if entry.name == "indexed_terms":
        return attention_indexed_bwd.terms_launch(call, lists, given, terms, entry.arch)
    found = indexed_lists.Listing(ints(B, 1, 16 * T), ints(B, 1, T + 1), 1, 16 * T)
    sums = attention_indexed_bwd.Sums(torch.empty(B, 1, T, D), torch.empty(B, 1, T, D))
    return attention_indexed_bwd.sums_launch(call, found, terms, sums)


def compiled(entry: Entry) -> Resources:
    """Compile one entry and read what it needs.

    Raises:
        RuntimeError: It does not compile; one line.
    """
    driver.set_active(NoDevice(entry.arch))
    launch = job(entry)
    launch.kernel.device_caches.clear()
    try:
        kernel = launch.kernel.warmup(*launch.arguments(), grid=(launch.grid,), **launch.options())
    except Exception as error:
        raise RuntimeError(f"{entry}: {reason(error)}") from None
    registers, spills, shared, code = read_binary(kernel)
    found = MATRIX.search(code)
    config = launch.config
    turn = device_loops.turn(device_loops.parsed(code.splitlines()))
    # A group of Gluon's warps has 64 rows of its own.
    warps, M = (4, 64) if entry.name == "gluon" else (config.num_warps, config.BLOCK_M)
    slots = warps * 1024 / (M * config.BLOCK_N)
    return Resources(
        entry.arch,
        entry.name,
        str(DTYPES[entry.size]).removeprefix("torch."),
        entry.D,
        entry.variant,
        *tile_of(config),
        registers,
        spills,
        shared,
        found[1].split("_f32")[0] if found else "",
        fingerprint(entry.name),
        cuda_resources.blocks_of_sm(entry.arch, registers, 32 * config.num_warps, shared),
        sum(map(device_loops.is_product, turn)),
        sum(map(device_loops.is_wait, turn)),
        device_loops.counts(turn, slots),
    )


def intermediate(entry: Entry) -> str:
    """An entry as Triton reads it: nothing optimised, names and types those of the source."""
    driver.set_active(NoDevice(entry.arch))
    launch = job(entry)
    launch.kernel.device_caches.clear()
    options = launch.options()
    *_, backend, binder = launch.kernel.device_caches[0]
    bound, specialised, given = binder(*launch.arguments(), **options)
    parsed, *parts = launch.kernel._pack_args(backend, options, bound, specialised, given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    ways = backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    source = launch.kernel.ASTSource(launch.kernel, *parts)
    return str(source.make_ir(driver.active.target, parsed, *ways))


def reason(error: BaseException) -> str:
    """What an error is about, in one line: Triton points at code, and says why in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip(" ^")]
    return lines[-1].strip() if lines else type(error).__name__


@functools.cache
def fingerprint(name: str) -> str:
    """8 hex digits that change with the device code that a pass is compiled from."""
    folder, own = Path(configs.__file__).parent, Path(MODULES[name].__file__)
    shared = device_code.shared_by(name)
    return device_code.digest((own, *(folder / f"{file}.py" for file in shared)))


def read_binary(kernel: Any) -> tuple[int, int, int, str]:
    """Registers, spills, shared memory and the machine code of a compiled kernel."""
    if "hsaco" in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        return number("vgpr_count"), number("vgpr_spill_count"), kernel.metadata.shared, text
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run(NVIDIA / "cuobjdump", "-res-usage", file.name)
        code = run(NVIDIA / "cuobjdump", "-sass", file.name)
    registers, spills = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
    if not re.search(r"\b(STL|LDL)\b", code):
        spills = 0  # a stack that nothing uses
    return registers, spills, kernel.metadata.shared, code


def run(*command: str | Path) -> str:
    """A tool's output."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(resources: Resources, known: Table) -> list[str]:
    """What an entry does that it must not."""
    r = resources
    what = []
    if r.shared > SHARED_LIMIT[r.arch]:
        what.append(f"{r.shared} bytes of shared memory, the limit is {SHARED_LIMIT[r.arch]}")
    default = r.D <= 128 and r.variant in VARIANTS[:2]
    if r.spills and default:
        what.append(f"{r.spills} bytes spilled")
    if r.dtype != "float32" and not r.matrix and r.name not in UNTILED:
        what.append("no matrix instructions")
    before = known.get(key(r))
    if r.waits >= max(r.products, 1):
        what.append("a wait for every wgmma")
    if before is not None:
        if before.loop and not r.loop:
            what.append("no loop with matrix products, the table has one")
        elif before.loop and r.loop[-1] > GROWTH * before.loop[-1]:
            what.append(f"{r.loop[-1]} issue slots, the table says {before.loop[-1]}")
        for field in ("registers", "spills", "shared"):
            now, then = getattr(r, field), getattr(before, field)
            if now > then:
                what.append(f"{field} {now}, the table says {then}")
    return [f"{' '.join(key(r))} {r.tile}: {x}" for x in what]


def key(r: Resources) -> tuple[str, ...]:
    """What identifies a row."""
    return r.arch, r.name, r.dtype, str(r.D), r.variant


def entry_key(entry: Entry) -> tuple[str, ...]:
    """What identifies an entry's row."""
    dtype = str(DTYPES[entry.size]).removeprefix("torch.")
    return entry.arch, entry.name, dtype, str(entry.D), entry.variant


def tile_of(config: configs.Config) -> tuple[str, int, int]:
    """A tile as the table has it."""
    return f"{config.BLOCK_M}x{config.BLOCK_N}", config.num_warps, config.num_stages


def table_path() -> Path:
    """The committed table of this Triton's minor version."""
    return TABLES / f"{'.'.join(triton.__version__.split('.')[:2])}.csv"


def read_table() -> Table:
    """The committed table by row key; empty if there is none."""
    if not table_path().exists():
        return {}
    known = {}
    with table_path().open() as file:
        for row in csv.DictReader(file):
            resources = resources_of(row)
            known[key(resources)] = resources
    return known


def resources_of(row: dict[str, str]) -> Resources:
    """A row of the table, read."""
    types = get_type_hints(Resources)
    values = (types[name](row[name]) for name in Resources._fields[:-1])
    return Resources(*values, tuple(int(row[name]) for name in LOOP if row[name]))


def cells(r: Resources) -> tuple[object, ...]:
    """A row of the table, to be written."""
    return (*r[:-1], *(r.loop or [""] * len(LOOP)))


def write_table(rows: Iterable[Resources]) -> None:
    """Add rows to the table of this Triton's version, in the order of `entries`."""
    order = {entry_key(entry): i for i, entry in enumerate(entries())}
    known = read_table() | {key(r): r for r in rows}
    kept = sorted((r for r in known.values() if key(r) in order), key=lambda r: order[key(r)])
    TABLES.mkdir(exist_ok=True)
    path = table_path()
    unfinished = path.with_suffix(".new")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Resources._fields[:-1], *LOOP))
        writer.writerows(map(cells, kept))
    unfinished.replace(path)


def attempt(entry: Entry) -> Resources | str:
    """`compiled`, with its error as a string."""
    try:
        return compiled(entry)
    except RuntimeError as error:
        return str(error)


def results(chosen: Sequence[Entry], workers: int) -> Iterator[Resources | str]:
    """What became of entries, as they are done; those of a worker that was killed in words."""
    with ProcessPoolExecutor(workers) as pool:
        futures: dict[Future[Resources | str], Entry] = {pool.submit(attempt, e): e for e in chosen}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield f"{futures[future]}: the compiler's process was killed"


def part_of(text: str) -> tuple[int, int]:
    """``"2/8"`` as numbers.

    Raises:
        argparse.ArgumentTypeError: It is not N/M with 1 <= N <= M.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be N/M with 1 <= N <= M, got {text!r}")
    return int(found[1]), int(found[2])


def in_part(entry: Entry, part: tuple[int, int]) -> bool:
    """Whether an entry belongs to part N of M: by its name alone, so that parts stay as they are.

    A pass's architectures follow one another through the parts: each part has all of them.
    """
    arch = ARCHITECTURES.index(entry.arch)
    name = " ".join(entry_key(entry)[1:])
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return (digest + arch) % part[1] == part[0] - 1


def chosen_entries(given: argparse.Namespace, known: Table) -> list[Entry]:
    """The entries that the command line asks for."""
    found = [
        entry
        for entry in entries()
        if entry.arch in given.arch
        and entry.name in given.passes
        and entry.D in given.head_dim
        and entry.variant in given.variant
        and entry.size in given.bytes
        and in_part(entry, given.sample)
    ]
    if not given.missing:
        return found
    return [entry for entry in found if not is_current(entry, known)]


def is_current(entry: Entry, known: Table) -> bool:
    """Whether the table has an entry as the sources are now, tile included."""
    row = known.get(entry_key(entry))
    if row is None or row.source != fingerprint(entry.name):
        return False
    driver.set_active(NoDevice(entry.arch))
    config = job(entry).config
    return tile_of(config) == (row.tile, row.warps, row.stages)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--write", action="store_true", help="write the table")
    made.add_argument("--missing", action="store_true", help="only what the table lacks")
    made.add_argument("--sample", type=part_of, default=(1, 1), metavar="N/M")
    made.add_argument("--arch", nargs="*", default=ARCHITECTURES)
    made.add_argument("--pass", nargs="*", default=tuple(MODULES), dest="passes")
    made.add_argument("--head-dim", nargs="*", type=int, default=(1, *configs.HEAD_DIMS))
    made.add_argument("--variant", nargs="*", default=VARIANTS)
    made.add_argument("--bytes", nargs="*", type=int, default=tuple(DTYPES))
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser().parse_args(arguments)
    known = read_table()
    chosen = chosen_entries(given, known)
    rows: list[Resources] = []
    wrong: list[str] = []
    for result in results(chosen, given.workers):
        if isinstance(result, str):
            wrong.append(result)
            print(result, flush=True)
            continue
        rows.append(result)
        found = faults(result, {} if given.write else known)
        wrong += found
        print(*cells(result), "; ".join(found) and "FAULT", flush=True)
        if given.write and len(rows) % WRITE_EVERY == 0:
            write_table(rows)
    if given.write:
        write_table(rows)
    elif missing := [r for r in rows if key(r) not in known]:
        wrong.append(f"{len(missing)} entries are not in {table_path()}: use --write")
    print(f"\nTriton {triton.__version__}: {len(rows)} kernels compiled, {len(wrong)} faults")
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
