"""Random malformed calls of everything public: a result or one line of error, whatever is given.

A call is an expression, made from a seed and its number, and evaluated in a process of its own: a
crash is then seen and named. Run all of them, or one again, with

    python tests/malformed_calls.py --calls 10000
    python tests/malformed_calls.py --first 4711 --calls 1 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import attnfast

# What no error may say, and what no call may raise: something inside went wrong.
INTERNAL = re.compile(
    r"INTERNAL ASSERT|aoti_torch|file an issue|[Ii]nternal error|std::|vector|report a bug"
)
TORCHS_ASSERTION = "embed_dim must be divisible by num_heads"
TORCHS = (RuntimeError, NotImplementedError, MemoryError)  # in torch's own words, where it raises


class Named(Tensor):
    """A subclass with nothing of its own."""


class Asked(Tensor):
    """A subclass that torch's functions ask."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(Tensor):
    """A subclass whose values lie in another tensor, and which operators look for there."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.held if isinstance(x, Wrapped) else x

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


class Refusing(Wrapped):
    """Another, which no operator may use."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"Refusing has no {func}")


def f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def b(*shape: int) -> Tensor:
    return f(*shape) > -0.5


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


def freed(x: Tensor) -> Tensor:
    """Without its memory."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    """Without the second half of its memory."""
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def spread(x: Tensor) -> Tensor:
    """With another last stride."""
    return x.repeat_interleave(2, -1)[..., ::2]


def filled(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


def lone(x: Tensor, value: float) -> Tensor:
    """With another first element."""
    x = x.clone()
    x.view(-1)[0] = value
    return x


def causal_bias(T: int, S: int) -> Any:
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(T, S)


def masked(x: Tensor) -> Any:
    from torch.masked import masked_tensor

    return masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    return attnfast.MultiheadAttention(**({"embed_dim": 16, "num_heads": 4} | options))


def filled_cache(rows: int = 3) -> Any:
    cache = attnfast.KVCache()
    cache.append(f(2, 4, rows, 4), f(2, 4, rows, 4))
    return cache


NAMESPACE = {
    **{name: getattr(torch, name) for name in ("bfloat16", "float64", "nested", "Tensor")},
    **{x.__name__: x for x in (Named, Asked, Wrapped, Refusing)},
    **{
        x.__name__: x
        for x in (f, b, ints, longs, freed, shrunk, spread, filled, lone, causal_bias, masked)
    },
    **{x.__name__: x for x in (layer, filled_cache)},
    **{name: getattr(attnfast, name) for name in ("attention", "varlen_attention", "explain")},
    **{name: getattr(attnfast, name) for name in ("decode_attention", "MultiheadAttention")},
    "warm_up": attnfast.warm_up,
    "scaled_dot_product_attention": attnfast.scaled_dot_product_attention,
    "KVCache": attnfast.KVCache,
    "BlockMask": attnfast.BlockMask,
    "torch": torch,
    "np": np,
    "nn": nn,
    "inf": float("inf"),
    "nan": float("nan"),
}

# Things of a wrong kind, for any argument.
THINGS = (
    *("None", "True", "False", "0", "1", "-1", "7", "2**31 - 1", "-2**31", "2**31", "2**64"),
    *("10**400", "0.5", "-0.5", "3e38", "1e-45", "nan", "inf", "-inf", "1j", "''", "'mean'"),
    *("BlockMask.nothing((1, 1, 6, 7), 64)", "BlockMask.prefix(longs(3, 4), 9, 9)"),
    *("'x' * 1000", "b'x'", "()", "(1,)", "(1, 2)", "(-1, 0)", "(None, 2**40)", "(1, 2, 3)"),
    *("(nan, 1)", "('a', 'b')", "[]", "[1, 2]", "[[1.0] * 99] * 99", "{}", "{'a': 1}", "object()"),
    *("print", "int", "range(3)", "torch.float32", "torch.device('cpu')", "torch.Size([1, 2])"),
    *("np.zeros((2, 4, 6, 8))", "np.float32(0.5)", "np.int64(3)", "np.bool_(True)", "np.array(3)"),
    *("torch.tensor(2)", "torch.tensor(2.0)", "torch.tensor(True)", "f(0)", "f(3)", "f(2, 3)"),
    *("nn.Parameter(torch.tensor(2.0))", "nn.Linear(2, 2)", "f(2, 3).to_sparse()", "longs()"),
    *("causal_bias(6, 7)", "nn.parameter.UninitializedParameter()", "torch.empty(0, 0, 0, 0)"),
    *("torch.nested.nested_tensor([f(3, 4), f(2, 4)])", "torch.empty((), device='meta')"),
    *("torch.nested.nested_tensor([f(3, 4), f(2, 4)], layout=torch.jagged)", "Asked(f(2, 3))"),
    "torch.quantize_per_tensor(f(2, 4, 6, 8), 0.1, 0, torch.quint8)",
    "f(1, 1, 1, 8).expand(1, 1, 2**28 + 1, 8)",
    "f(1, 1, 1, 1).expand(2**20, 2**20, 2**20, 1)",
)

# And what may have happened to a tensor.
CHANGES = (
    *("{}[None]", "{}[0]", "{}[:0]", "{}[..., :0]", "{}[..., 1:]", "{}[1:]", "{}.flatten()"),
    *("{}.double()", "{}.half()", "{}.bfloat16()", "{}.long()", "{}.int()", "{}.bool()"),
    *("{}.to(torch.complex64)", "{}.to('meta')", "freed({})", "shrunk({})", "spread({})"),
    *("{}.t()", "{}.mT.contiguous().mT", "{}.transpose(0, 1)", "{}.flip(0)", "{}[..., None]"),
    *("filled({}, nan)", "filled({}, inf)", "filled({}, -1)", "filled({}, 2**20)", "{}.tolist()"),
    *("lone({}, nan)", "lone({}, -1)", "lone({}, 2**40)", "lone({}, -2**40)", "{}.numpy()"),
    *("nn.Parameter({})", "{}.requires_grad_()", "{}.as_subclass(Named)", "{}.as_subclass(Asked)"),
    *(
        "Wrapped({})",
        "Refusing({})",
        "masked({})",
        "{}.to_sparse()",
        "{}.to_mkldnn()",
        "{}.numel()",
    ),
    *("{}.repeat_interleave(2, 0)", "{}.repeat_interleave(2, -1)", "freed({}.long())", "[{}]"),
    "torch.nested.nested_tensor(list({}))",
    "torch.nested.nested_tensor(list({}), layout=torch.jagged)",
    "torch.complex({0}, {0}).conj().imag",
)

WINDOWS = "torch.tensor([[1, 0], [-1, 2], [0, 0], [2**31 - 1, -1]])"
SCORES = {
    "causal": ("True", "False"),
    "window": ("None", "(2, None)", "(0, 3)", "(2**31 - 1, 2**31 - 1)", WINDOWS),
    "align": ("'top_left'", "'bottom_right'", "1", "-3", "2**29", "longs(1, 2)", "ints(-5, 9)"),
    "scale": ("None", "0.3", "-2", "0.0"),
    "softcap": ("None", "5.0", "1e-3"),
    "alibi_slopes": ("None", "f(4)", "f(2, 4)"),
    "sinks": ("None", "f(4)", "f(4).bfloat16()"),
    "dropout_p": ("0.0", "0.1", "1.0"),
    "dropout_seed": ("None", "longs(3, 4)", "longs(-1, 2**62)"),
    "return_lse": ("True", "False"),
    "return_stats": ("True", "False", "'received'"),
    "return_weights": ("True", "False", "'mean'"),
    "deterministic": ("None", "True", "False"),
    "backend": ("'auto'", "'cpu'", "'reference'", "'cuda'", "'triton'"),
}
DENSE = {"q": ("f(2, 4, 6, 8)",), "k": ("f(2, 2, 7, 8)",), "v": ("f(2, 2, 7, 5)",)}
MASKS = {
    "mask": ("None", "b(6, 7)", "b(2, 1, 1, 7)", "b(4, 6, 7)", "BlockMask.strided(6, 7, 3)"),
    "bias": ("None", "f(4, 6, 7)", "f(2, 1, 6, 1)", "f(6, 7).double()"),
}
CHOSEN = {
    "indices": ("None", "ints(0, 3, -1, 6).expand(2, 6, 4)", "longs(5, 5).expand(2, 2, 6, 2)"),
}
PACKED = {
    "q": ("f(9, 4, 8)",),
    "k": ("f(11, 2, 8)",),
    "v": ("f(11, 2, 5)",),
    "cu_seqlens_q": ("ints(0, 4, 9)", "longs(0, 4, 9)"),
    "cu_seqlens_k": ("ints(0, 5, 11)",),
    "max_seqlen_q": ("5", "6", "torch.tensor(5)"),
    "max_seqlen_k": ("6", "np.int64(7)"),
}
PACKED_MASKS = {"mask": ("None", "b(1, 1)"), "bias": ("None", "f(4, 1, 1)")}
DECODED = {
    "q": ("f(2, 4, 2, 8)",),
    "k_cache": ("f(2, 2, 12, 8)",),
    "v_cache": ("f(2, 2, 12, 5)",),
    "cache_seqlens": ("ints(3, 12)", "longs(0, 7)"),
}
PAGED = {
    "q": ("f(2, 4, 2, 8)",),
    "k_cache": ("f(5, 4, 2, 8)",),
    "v_cache": ("f(5, 4, 2, 5)",),
    "cache_seqlens": ("ints(3, 8)",),
    "page_table": ("torch.tensor([[0, -7], [2, 4]])", "ints(1, 2, 3, 4).view(2, 2)"),
}
STEP = {name: SCORES[name] for name in ("scale", "window", "softcap", "alibi_slopes", "sinks")}
STEP |= {"mask": ("None", "b(2, 2)", "b(2, 1, 2, 2)", "BlockMask.from_tree(longs(-1, 0))")}
STEP |= {"bias": ("None", "f(4, 1, 1)"), "return_lse": ("True", "False")}
STEP |= {"return_received": ("True", "False")}
STEP |= {"backend": SCORES["backend"]}
TORCH = {
    "query": ("f(2, 4, 6, 8)", "f(6, 8)"),
    "key": ("f(2, 4, 7, 8)",),
    "value": ("f(2, 4, 7, 5)",),
}
TORCH_OPTIONS = {
    "attn_mask": ("None", "b(6, 7)", "f(2, 1, 6, 7)"),
    "dropout_p": ("0.0", "0.5"),
    "is_causal": ("True", "False"),
    "scale": ("None", "0.3"),
    "enable_gqa": ("True", "False"),
}
BUILT = {"embed_dim": ("16",), "num_heads": ("4",)}
BUILT_OPTIONS = {
    "dropout": ("0.0", "0.1"),
    "bias": ("True", "False"),
    "add_bias_kv": ("True", "False"),
    "add_zero_attn": ("True", "False"),
    "kdim": ("None", "12"),
    "vdim": ("None", "12"),
    "batch_first": ("True", "False"),
    "num_kv_heads": ("None", "2"),
    "window": ("None", "(2, 0)", WINDOWS),
    "softcap": ("None", "3.0"),
    "sinks": ("True", "False"),
    "alibi": ("True", "False"),
    "similarity": ("'dot'", "'cosine'"),
    "collect_stats": ("True", "False"),
    "backend": ("'auto'", "'cpu'"),
}
FORWARD = {"query": ("f(2, 6, 16)",), "key": ("f(2, 7, 16)",), "value": ("f(2, 7, 16)",)}
FORWARD_OPTIONS = {
    "key_padding_mask": ("None", "b(2, 7)"),
    "need_weights": ("True", "False"),
    "attn_mask": ("None", "b(6, 7)", "f(8, 6, 7)", "BlockMask.strided(6, 7, 3)"),
    "average_attn_weights": ("True", "False"),
    "is_causal": ("True", "False"),
    "kv_cache": ("None", "filled_cache()", "KVCache()"),
}
APPENDED = {"k": ("f(2, 4, 3, 4)",), "v": ("f(2, 4, 3, 4)",)}

# What is called, by what an error may name it; arguments that are needed, and options.
TARGETS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("attention", "attention", DENSE, MASKS | SCORES),
    ("attention", "attention", DENSE, CHOSEN | SCORES),
    ("varlen_attention", "varlen_attention", PACKED, PACKED_MASKS | SCORES),
    ("decode_attention", "decode_attention", DECODED, STEP),
    ("decode_attention", "decode_attention", PAGED, STEP),
    ("scaled_dot_product_attention", "scaled_dot_product_attention", TORCH, TORCH_OPTIONS),
    ("explain", "explain|attention", DENSE, MASKS | CHOSEN | SCORES),
    ("explain", "explain|varlen_attention", PACKED, PACKED_MASKS | SCORES),
    ("explain", "explain|decode_attention", DECODED, STEP),
    ("warm_up", "warm_up|attention", DENSE, MASKS | SCORES),
    ("warm_up", "warm_up|varlen_attention", PACKED, PACKED_MASKS | SCORES),
    ("warm_up", "warm_up|decode_attention", PAGED, STEP),
    ("MultiheadAttention", "MultiheadAttention", BUILT, BUILT_OPTIONS),
    ("layer(batch_first=True)", "MultiheadAttention|KVCache", FORWARD, FORWARD_OPTIONS),
    ("layer(batch_first=True).eval()", "MultiheadAttention|KVCache", FORWARD, FORWARD_OPTIONS),
    ("layer(dropout=0.1, sinks=True, add_bias_kv=True)", "MultiheadAttention", FORWARD, {}),
    ("KVCache", "KVCache", {}, {"max_length": ("None", "3")}),
    ("filled_cache().append", "KVCache", APPENDED, {"prefix": ("0", "1")}),
    ("filled_cache().reorder", "KVCache", {"index": ("longs(1, 0)",)}, {}),
    ("filled_cache().crop", "KVCache", {"length": ("2",)}, {}),
)


def call_of(seed: int, number: int) -> tuple[str, dict[str, str], str]:
    """What is called, the expressions of its arguments, and what an error has to name."""
    rng = random.Random(f"{seed} {number}")
    target, names, needed, options = rng.choice(TARGETS)
    given = {name: rng.choice(values) for name, values in needed.items()}
    for name in rng.sample(sorted(options), rng.randint(0, min(4, len(options)))):
        given[name] = rng.choice(options[name])
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        name = rng.choice(sorted(needed | options))
        value = given.get(name) or rng.choice((needed | options)[name])
        if re.search("freed|shrunk|expand", value):  # torch itself does not survive, or takes GBs
            continue
        if "(" in value and rng.random() < 0.7:
            given[name] = rng.choice(CHANGES).format(value)
        elif name.startswith("max_seqlen"):  # memory and time may follow what is asked for
            given[name] = rng.choice([thing for thing in THINGS if thing != "2**31 - 1"])
        else:
            given[name] = rng.choice(THINGS)
    fate = rng.random()
    if fate < 0.03 and given:
        del given[rng.choice(sorted(given))]
    elif fate < 0.06:
        given[rng.choice(("attn_mask", "is_causal", "nonsense", "window_size"))] = "None"
    return target, given, names


def text_of(target: str, given: dict[str, str]) -> str:
    return f"{target}({', '.join(f'{name}={value}' for name, value in given.items())})"


def snapshot(x: Any) -> bytes | None:
    """What a tensor's memory holds, where it has any that can be seen."""
    if type(x) not in (Tensor, nn.Parameter, Named, Asked) or x.is_nested or x.is_meta:
        return None
    if x.layout is not torch.strided or not 0 < x.untyped_storage().nbytes() < 1 << 20:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().tobytes()


def problem(number: int, seed: int) -> str | None:
    """What is wrong with the outcome of a call, or None."""
    target, given, names = call_of(seed, number)
    try:
        function = eval(target, NAMESPACE)
        arguments = {name: eval(value, NAMESPACE) for name, value in given.items()}
    except Exception:  # what cannot be made cannot be given
        return None
    before = [snapshot(x) for x in tree_leaves(arguments)]
    said = outcome(function, arguments, names)
    if said is None and [snapshot(x) for x in tree_leaves(arguments)] != before:
        said = "an input was modified"
    return said


def outcome(function: Any, arguments: dict[str, Any], names: str) -> str | None:
    """Call, and go backward if there is a gradient: what is wrong with what comes of it."""
    returned = False
    try:
        result = function(**arguments)
        returned = True
        tensors = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor) and x.requires_grad]
        if tensors:
            tensors[0].float().sum().backward()
    except TORCHS as error:
        return f"{type(error).__name__}: {error}" if INTERNAL.search(str(error)) else None
    except (TypeError, ValueError) as error:
        text = str(error)
        if INTERNAL.search(text) or "\n" in text.strip():
            return f"{type(error).__name__}: {text}"
        named = returned or "Refusing" in text or re.search(rf"\b({names})\b", text)
        return None if named else f"{type(error).__name__} without a name: {text}"
    except Exception as error:
        return None if str(error) == TORCHS_ASSERTION else f"{type(error).__name__}: {error}"
    return None


def run(first: int, calls: int, seed: int) -> None:
    """Make calls in this process: a line ``at N`` before each, and one for what is wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(first, first + calls):
        print(f"at {number}", flush=True)
        said = problem(number, seed)
        if said is not None:
            print(f"wrong {report(number, seed, said)}", flush=True)


def report(number: int, seed: int, said: str) -> str:
    target, given, _ = call_of(seed, number)
    return f"{number} of seed {seed}: {text_of(target, given)}: {' '.join(said.split())[:300]}"


def findings(first: int, calls: int, seed: int, timeout: int) -> Iterator[str]:
    """What is wrong with some calls, made in processes: after one that dies comes another."""
    last = first + calls
    while first < last:
        command = [sys.executable, __file__, "--inside", "--seed", str(seed)]
        command += ["--first", str(first), "--calls", str(last - first)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            output, status = done.stdout, done.returncode
            trouble = done.stderr.strip().splitlines()[-1:] or [""]
        except subprocess.TimeoutExpired as late:
            output, status = (late.stdout or b"").decode(), "timeout"
            trouble = [f"after {timeout} s"]
        lines = output.splitlines()
        yield from (line.removeprefix("wrong ") for line in lines if line.startswith("wrong "))
        if status == 0:
            return
        numbers = [int(line.split()[1]) for line in lines if line.startswith("at ")]
        number = numbers[-1] if numbers else first
        yield report(number, seed, f"the process ended with {status} {trouble[0]}")
        first = number + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--inside", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.inside:
        run(options.first, options.calls, options.seed)
        return 0
    found = list(findings(options.first, options.calls, options.seed, timeout=1800))
    print("\n".join([*found, f"{options.calls} calls, {len(found)} of them wrong"]))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
