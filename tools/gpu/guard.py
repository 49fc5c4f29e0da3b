"""Work that may crash or hang, done by a process of its own: a failure costs only its item.

The process reads one item (JSON, a line) at a time and answers with one line. Whoever waits too
long for an answer kills the process, says what happened, and goes on in a new one. A `Journal`
keeps the outcomes, so that a run that was cut short goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

Item = dict[str, Any]


class Outcome(NamedTuple):
    """What became of one item: a result, or why there is none."""

    item: Item
    result: Any
    failure: str | None
    seconds: float


class Limits(NamedTuple):
    """When to give up."""

    start_s: float  # for a new process to be ready
    item_s: float  # for one item
    deaths: int  # processes that may be lost before the remaining items are left undone
    until: float = float("inf")  # time.monotonic() after which no item is begun


NO_TIME, LEFT = "no time left", "left undone"
UNDONE = (NO_TIME, LEFT)  # how the failures of items begin that were never begun


def run(
    command: list[str],
    items: list[Item],
    limits: Limits,
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Outcome]:
    """Have items done in their order, each with its outcome.

    Args:
        command: Starts a process that calls `serve`.
        items: What is to be done.
        limits: When to give up.
        log: Where the processes' messages are added.
        variables: Of the processes' environment, beside this one's.
    """
    deaths = 0
    child: _Child | None = None
    try:
        for item in items:
            if time.monotonic() > limits.until:
                yield Outcome(item, None, NO_TIME, 0.0)
                continue
            if deaths >= limits.deaths:
                yield Outcome(item, None, f"{LEFT} after {deaths} crashes or hangs", 0.0)
                continue
            start = time.monotonic()
            failure = None
            if child is None:
                child = _Child(command, log, variables or {})
                failure = child.wait_ready(limits.start_s)
            answer: dict[str, Any] = {}
            if failure is None:
                answer, failure = child.ask(item, limits.item_s)
            seconds = time.monotonic() - start
            if failure is not None:
                child.kill()
                child, deaths = None, deaths + 1
                yield Outcome(item, None, failure, seconds)
                continue
            yield Outcome(item, answer.get("result"), answer.get("failure"), seconds)
            if answer.get("last"):  # the process says that it is of no more use
                child.kill()
                child = None
    finally:
        if child is not None:
            child.close()


class Journal:
    """The outcomes of one run in a file, a line each: those that are there are not made again.

    Args:
        path: The file.
        stamp: What outcomes depend on beside their items (device, versions, sources): JSON. A file
            with another stamp begins anew.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path, self.known = path, {}
        head = json.dumps({"stamp": stamp}, sort_keys=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] != [head]:
            path.write_text(f"{head}\n")
            lines = []
        for line in lines[1:]:
            with contextlib.suppress(json.JSONDecodeError):  # the run ended while it was written
                found = json.loads(line)
                self.known[found["key"]] = found

    def run(
        self,
        command: list[str],
        items: list[Item],
        limits: Limits,
        log: Path,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Outcome]:
        """As `run` of this module, of the items whose outcome is not known."""
        keys = [self._key(command, item, variables) for item in items]
        missing = [item for item, key in zip(items, keys, strict=True) if key not in self.known]
        made = run(command, missing, limits, log, variables)
        for item, key in zip(items, keys, strict=True):
            if (found := self.known.get(key)) is not None:
                yield Outcome(item, found["result"], found["failure"], found["seconds"])
                continue
            outcome = next(made)
            if outcome.failure is None or not outcome.failure.startswith(UNDONE):
                self._keep(key, outcome.result, outcome.failure, outcome.seconds)
            yield outcome

    @staticmethod
    def _key(command: list[str], item: Item, variables: Mapping[str, str] | None) -> str:
        told = {name: x for name, x in item.items() if name != "ceilings"}  # measured anew
        return json.dumps([command, told, dict(variables or {})], sort_keys=True)

    def _keep(self, key: str, result: Any, failure: str | None, seconds: float) -> None:
        found = {"key": key, "result": result, "failure": failure, "seconds": seconds}
        self.known[key] = found
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")


def serve(work: Callable[[Item], Any], poisoned: Callable[[Exception], bool]) -> None:
    """Be the process: do items from standard input until it ends.

    Args:
        work: Does one item; its result must be JSON. What it raises is the item's failure.
        poisoned: Whether no further item can be done after such an error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        try:
            answer({"result": work(json.loads(line))})
        except Exception as error:  # whatever it is, it is this item's
            text = f"{type(error).__name__}: {error}".strip().replace("\n", "; ")
            print(text, file=sys.stderr, flush=True)
            answer({"failure": text[:500], "last": poisoned(error)})


class _Child:
    """One process and what it says."""

    def __init__(self, command: list[str], log: Path, variables: Mapping[str, str]) -> None:
        self.log: IO[bytes] = log.open("ab")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, **variables},
            start_new_session=True,  # killed with all its children
        )
        assert self.process.stdout is not None
        self.pending = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def wait_ready(self, timeout_s: float) -> str | None:
        """Why the process did not start, or None."""
        answer, failure = self._read(timeout_s)
        return failure or (None if answer.get("ready") else "did not start")

    def ask(self, item: Item, timeout_s: float) -> tuple[dict[str, Any], str | None]:
        """The answer to an item, or why there is none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(item).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone: reading says how
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> tuple[dict[str, Any], str | None]:
        assert self.process.stdout is not None
        until = time.monotonic() + timeout_s
        while b"\n" not in self.pending:
            left = until - time.monotonic()
            if left <= 0 or not self.selector.select(left):
                return {}, f"hang: no answer in {timeout_s:g} s"
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                return {}, self._death()
            self.pending += part
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line), None

    def _death(self) -> str:
        code = self.process.wait(10)
        if code < 0:
            return f"crash: {signal.Signals(-code).name}"
        return f"crash: exit code {code}"

    def kill(self) -> None:
        """End the process and its children now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._release()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
            return
        self._release()

    def _release(self) -> None:
        self.process.wait()
        self.selector.close()
        self.log.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
