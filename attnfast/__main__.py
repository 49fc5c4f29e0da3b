"""``python -m attnfast``: what this machine can run, or why it cannot."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, dispatch, ops, selfcheck
from .call import Options


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m attnfast", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every available backend, forward and backward, against the fp64 reference",
    )
    options = parser.parse_args(arguments)
    report = describe()
    if not options.json:
        print(as_text(report))
    verdicts = []
    if options.check:
        available = [
            (row["name"], device)
            for row in report["backends"]
            if row["available"]
            for device in row["devices"]
        ]
        if not options.json:
            print(f"\n{CHECK_HEADER}")
        for verdict in selfcheck.run(available):
            verdicts.append(verdict)
            if not options.json:
                print(line_of(verdict), flush=True)
        report["check"] = [{**verdict._asdict(), "ok": verdict.ok} for verdict in verdicts]
    failed = sum(not verdict.ok for verdict in verdicts)
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.check:
        print(f"\n{len(verdicts) - failed} of {len(verdicts)} within the accuracy rule")
    return int(failed > 0)


def describe() -> dict[str, Any]:
    """Versions, threads, the native library and every backend, as plain values for JSON."""
    loaded = [x for x in torch.ops.loaded_libraries if Path(x).name.startswith("_native")]
    return {
        "attnfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "native_library": loaded[0] if loaded else None,
        "backends": [backend(name) for name in dispatch.NAMES],
    }


def backend(name: str) -> dict[str, Any]:
    """One backend: where it runs and with what, or why it does not run here."""
    served = {
        device: row
        for device, table in dispatch.BACKENDS.items()
        for row in table
        if row.name == name and (device != "xpu" or absent(device) is None)
    }
    refusals = {device: refusal(name, device) or absent(device) for device in served or ("cpu",)}
    devices = [device for device, reason in refusals.items() if reason is None]
    if name == "cuda" and backends.cuda.IN_LIBRARY and not devices:
        refusals["built for"] = f"they are built for {backends.cuda.details()}"
    result: dict[str, Any] = {
        "name": name,
        "available": bool(devices),
        "devices": devices,
        "reason": None if devices else "; ".join(dict.fromkeys(map(str, refusals.values()))),
        "details": served[devices[0]].details() if devices else None,
        "dtypes": [backends.dtype_name(x) for x in dtypes(name, devices[0])] if devices else [],
    }
    if name == "cpu" and devices:
        result |= {"instruction_set": ops.cpu_isa(), "instruction_sets": ops.cpu_isas()}
    return result


def dtypes(name: str, device: str) -> list[torch.dtype]:
    """The dtypes in which a backend takes a plain call on a device."""
    return [
        dtype
        for dtype in backends.FUSED_DTYPES
        if dispatch.refusal(name, plain_problem(device, dtype)) is None
    ]


def refusal(name: str, device: str) -> str | None:
    """Why a backend takes a plain call on a device in no dtype, or None."""
    if dtypes(name, device):
        return None
    return dispatch.refusal(name, plain_problem(device, torch.float16))  # which all could take


def absent(device: str) -> str | None:
    """Why there are no tensors on a device, or None."""
    if device == "cpu" or torch.get_device_module(device).is_available():
        return None
    return "no GPU that torch can use"


def plain_problem(device: str, dtype: torch.dtype) -> backends.Problem:
    """A small call without options: what refuses it in every dtype refuses everything."""
    return backends.Problem(
        kind="attention",
        device=torch.device(device),
        dtype=dtype,
        B=1,
        H=1,
        H_kv=1,
        T=64,
        S=64,
        D=64,
        D_v=64,
        options=Options(scale=0.125),
    )


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"attnfast {report['attnfast']}, torch {report['torch']}, Python {report['python']}",
        f"{report['platform']}, {report['threads']} threads",
        f"native library: {report['native_library'] or 'none'}",
        "",
    ]
    for row in report["backends"]:
        state = row["details"] if row["available"] else f"not here: {row['reason']}"
        others = [x for x in row.get("instruction_sets", []) if x != row["instruction_set"]]
        if others:
            state += f" (ATTNFAST_CPU_ISA can choose {', '.join(others)})"
        if row["available"] and len(row["dtypes"]) < len(backends.FUSED_DTYPES):
            state += f" ({', '.join(row['dtypes'])} only)"
        lines.append(f"{row['name']:<10} {state}")
    return "\n".join(lines)


CHECK_HEADER = (
    f"{'backend':<10} {'dtype':<9} {'case':<34} {'worst':<7} {'error':>8} {'bound':>8}"
    f" {'fwd ms':>8} {'bwd ms':>8}"
)


def line_of(verdict: selfcheck.Verdict) -> str:
    """A row under CHECK_HEADER: the result that is closest to its bound, or beyond it."""
    worst = max(verdict.bounds, key=lambda name: _share(verdict, name))
    return (
        f"{verdict.backend:<10} {verdict.dtype:<9} {verdict.case:<34} {worst:<7}"
        f" {verdict.errors[worst]:8.1e} {verdict.bounds[worst]:8.1e}"
        f" {verdict.forward_ms:8.2f} {verdict.backward_ms:8.2f}  {'ok' if verdict.ok else 'FAILED'}"
    )


def _share(verdict: selfcheck.Verdict, name: str) -> float:
    share = verdict.errors[name] / verdict.bounds[name]
    return float("inf") if share != share else share


if __name__ == "__main__":
    sys.exit(main())
