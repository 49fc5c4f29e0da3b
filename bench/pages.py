"""What all written pages share: the place that is filled, and where the figures come from."""

from __future__ import annotations

from pathlib import Path

from . import OURS, environment
from .results import Run

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def fill(page: Path, text: str) -> Path:
    """Put a text between a page's markers.

    Raises:
        ValueError: It has none; one line.
    """
    before, begin, rest = (page.read_text() if page.exists() else "").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"bench: {page} has no line {BEGIN} followed by {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return page


def device_title(run: Run) -> str:
    """The device's name for headings."""
    machine, threads = run.facts["machine"], run.facts["settings"]["threads"]
    if "gpu" in machine:
        return f"{machine['gpu']['name']}, {run.facts['kernel']}"
    return f"{machine['cpu']}, {run.facts['kernel']}, {threads} thread{'s' * (threads > 1)}"


def provenance(run: Run) -> str:
    """Where the figures come from, in one paragraph."""
    facts, versions = run.facts, run.facts["versions"]
    machine, settings = facts["machine"], facts["settings"]
    commit = (facts["commit"]["id"] or "unknown")[:12]
    dirty = " with uncommitted changes" if facts["commit"]["dirty"] else ""
    load = "" if facts["load"] is None else f"; load before the run {facts['load']}"
    words = {"cpu time": "CPU time of the thread", "events": "GPU events"}
    clocks = dict.fromkeys(words.get(row["clock"], "time on the wall") for row in run.rows)
    others = [f"{name} {version}" for name, version in versions.items() if name != "attnfast"]
    rivals = sorted({name for row in run.rows for name in row.get("contestants", ())} - {OURS})
    beside = f" Rivals that took part: {', '.join(rivals)}." if rivals else ""
    now = environment.sources(settings["backend"])
    changed = "" if facts["sources"] == now else " The kernels have changed since."
    return (
        f"{device_title(run)}; {machine['architecture']}, {machine['system']};"
        f" {machine['cores']} cores{load}; {', '.join(clocks)}; torch's kernels:"
        f" {facts['torch_isa']}. attnfast {versions['attnfast']} at commit {commit}{dirty} (kernel"
        f" sources {facts['sources']}), {', '.join(others)}; {facts['date'][:10]};"
        f" {settings['size']} suites.{beside}{changed}"
    )
