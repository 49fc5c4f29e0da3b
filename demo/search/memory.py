"""Peak memory of an embedding run, each model in a process of its own.

Each is loaded by a fresh `python -m demo.search.memory`, which embeds the given batches and
prints what they added.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from demo.measure import ATTNFAST, fresh_python, peak, restart_peak
from demo.search.encoder import Batch, load_encoder


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
        command, environment = fresh_python("demo.search.memory", *arguments)
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
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


if __name__ == "__main__":
    kind, path, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(kind, Path(path), torch.device(device))))
