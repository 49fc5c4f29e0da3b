"""Ctrl-C, or any signal whose handler raises, ends a long call soon; the next one is right."""

from __future__ import annotations

import subprocess
import sys

SETUP = """
import signal, sys, threading, time
import torch, attnfast

torch.set_num_threads(2)
T = 1 << 16
q, k, v = (torch.randn(1, 8, T, 64) for _ in "qkv")
small = [x[:, :, :300] for x in (q, k, v)]
right = attnfast.attention(*small)

class Alarm(Exception):
    pass

def raise_alarm(*_):
    raise Alarm("ringing")

def interrupted(call, handler=signal.default_int_handler, error=KeyboardInterrupt):
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.monotonic()
    try:
        call()
    except error as raised:
        assert raised.__context__ is None
        print(f"{type(raised).__name__} {raised}".strip())
    else:
        sys.exit("not interrupted")
    took = time.monotonic() - start
    assert took < 2.3, took
    assert torch.equal(attnfast.attention(*small), right)
"""

CALLS = {
    "kernels": """
interrupted(lambda: attnfast.attention(q, k, v))
half = [x.bfloat16() for x in (q, k, v)]
interrupted(lambda: attnfast.attention(*half))
few, keys = (x[:, :, : T // n].repeat(1, 64, 1, 1) for x, n in ((q, 32), (k, 4)))
interrupted(lambda: attnfast.attention(few, keys, keys, return_weights="mean"))
lengths, caches = torch.full((64,), T), [x.expand(64, 8, T, 64) for x in (k, v)]
interrupted(lambda: attnfast.decode_attention(torch.randn(64, 64, 64, 64), *caches, lengths))
""",
    "raw operator": """
from attnfast.call import Inputs, Options
arguments = (*Inputs(q, k, v), *Options(0.125))
interrupted(lambda: torch.ops.attnfast.cpu_fwd(*arguments))
""",
    "backward": """
leaves = [x[:, :, : T // 4].clone().requires_grad_() for x in (q, k, v)]
out = attnfast.attention(*leaves)
interrupted(lambda: out.sum().backward())
""",
    "compiled": """
f = torch.compile(lambda q, k, v: attnfast.attention(2 * q, k, v) + 1)
with torch.no_grad():
    f(*small), f(*(x[:, :, :200] for x in small))
    interrupted(lambda: f(q, k, v))
""",
    "another exception": "interrupted(lambda: attnfast.attention(q, k, v), raise_alarm, Alarm)",
}


def finished(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_long_calls_end() -> None:
    """Within two seconds, with what the handler raised and nothing else."""
    raised = {"kernels": ["KeyboardInterrupt"] * 4, "another exception": ["Alarm ringing"]}
    code = "".join(f"print({name!r})\n{calls}\n" for name, calls in CALLS.items())
    expected = [x for name in CALLS for x in (name, *raised.get(name, ["KeyboardInterrupt"]))]
    assert finished(code).splitlines() == expected


def test_handlers_that_do_not_raise() -> None:
    """They run while the call does, which goes on; so does a call outside the main thread."""
    code = """
heard = []
signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
q, k, v = (x[:, :, : T // 8] for x in (q, k, v))
out = attnfast.attention(q, k, v)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
assert torch.equal(attnfast.attention(q, k, v), out)
end = time.monotonic()
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(heard) > 1 and heard[0] < end
results = []
thread = threading.Thread(target=lambda: results.append(attnfast.attention(q, k, v)))
thread.start()
thread.join()
assert torch.equal(results[0], out)
print("went on")
"""
    assert finished(code) == "went on"
