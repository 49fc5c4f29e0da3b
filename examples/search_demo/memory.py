"""Peak memory of an embedding run, each model in a process of its own.

Within one process the two models would share an allocator's free lists and a high-water mark. So
each is loaded by a fresh `python -m search_demo.memory`, which embeds the given batches and prints
what they added.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from search_demo.encoder import Batch, load_encoder
from search_demo.measure import ATTNFAST

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(kind: str, batches: Sequence[Batch], device: torch.device) -> int | None:
    """Bytes that embedding `batches` adds, at its highest, to the loaded model.

    Args:
        kind: "torch", or "attnfast" for the model after `attnfast.replace`.
        batches: what to embed; the largest ones decide.
        device: CUDA memory is counted on a GPU, the process's resident memory on the CPU.

    Returns:
        Bytes, or None where the system does not tell.

    Raises:
        RuntimeError: the process failed; its error output.
    """
    with tempfile.TemporaryDirectory(prefix="attnfast-search-") as folder:
        path = Path(folder) / "batches.pt"
        torch.save([tuple(batch) for batch in batches], path)
        arguments = [kind, str(path), str(device), str(torch.get_num_threads())]
        paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        run = subprocess.run(
            [sys.executable, "-m", "search_demo.memory", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
    if run.returncode:
        raise RuntimeError(f"measuring the memory of {kind} failed:\n{run.stderr}")
    added = json.loads(run.stdout)
    return None if added is None else int(added)


def measure(kind: str, path: Path, device: torch.device) -> int | None:
    """What `peak_memory` asks of this process: bytes added over the loaded model, or None."""
    model = load_encoder().to(device)
    if kind == ATTNFAST:
        import attnfast

        attnfast.replace(model, verbose=False)
    batches = [Batch(*fields) for fields in torch.load(path)]
    small = [tensor[:1, :4] for tensor in batches[0].to(device)[1:]]
    with torch.inference_mode():
        model(*small)  # loads libraries and starts threads
        before = restart_peak(device)
        for batch in batches:
            model(*batch.to(device)[1:])
        after = peak(device)
    return None if before is None or after is None else after - before


def restart_peak(device: torch.device) -> int | None:
    """Lower the high-water mark to the memory now in use, where that is allowed, and return it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")
    return peak(device)


def peak(device: torch.device) -> int | None:
    """The high-water mark in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


if __name__ == "__main__":
    kind, path, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(kind, Path(path), torch.device(device))))
