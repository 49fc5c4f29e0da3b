"""Options and shapes in combinations that nobody thought of."""

from __future__ import annotations

from typing import Any

from accuracy import check
from cases import DTYPES, Case, problem, refusal, run
from hypothesis import assume, given
from hypothesis import strategies as st

LENGTHS = st.one_of(st.integers(0, 9), st.integers(10, 140), st.sampled_from((63, 64, 65, 128)))
HEAD_DIMS = st.one_of(st.integers(1, 20), st.sampled_from((32, 64, 65, 128)))
# A score is scale times a number of size 1: not so small that fp32 loses its digits to underflow.
SCALES = st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 1), st.floats(-1, -1e-6))
OPTIONAL_LENGTH = st.one_of(st.just(-1), st.integers(0, 100))


def subset(letters: str) -> st.SearchStrategy[str]:
    return st.sets(st.sampled_from(letters)).map(lambda some: "".join(sorted(some)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case of any options; those of a padded call, or of a varlen one of up to five sequences."""
    fields: dict[str, Any] = {}
    varlen = draw(st.booleans())
    letters = "hts" if varlen else "bhts"
    if varlen:
        pairs = st.tuples(LENGTHS, LENGTHS)
        fields["lengths"] = tuple(draw(st.lists(pairs, min_size=1, max_size=5)))
    H_kv = draw(st.integers(1, 3))
    stats = draw(st.integers(0, 2))
    weights = draw(st.sampled_from(("none", "mean", "per head")))
    wanted = {"out", "lse"} | set(["entropy"] * (stats > 0) + ["weights"] * (weights != "none"))
    bias = draw(st.none() | subset(letters))
    return Case(
        B=draw(st.integers(0, 3)),
        H=H_kv * draw(st.integers(1, 3)),
        H_kv=H_kv,
        T=draw(LENGTHS),
        S=draw(LENGTHS),
        D=draw(HEAD_DIMS),
        D_v=draw(st.just(0) | HEAD_DIMS),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(SCALES),
        causal=draw(st.booleans()),
        window=(draw(OPTIONAL_LENGTH), draw(OPTIONAL_LENGTH)),
        align=draw(st.integers(-50, 150) | st.sampled_from(("bottom_right", "tensor"))),
        softcap=draw(st.just(0.0) | st.floats(0.5, 50)),
        alibi=draw(st.sampled_from(("", "h", "bh"))),
        sinks=draw(st.booleans()),
        mask=draw(st.none() | subset(letters)),
        bias=bias,
        bias_dtype=draw(st.none() | st.sampled_from(DTYPES)),
        masking_bias=bias is not None and draw(st.booleans()),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))),
        weights=weights,
        stats=stats,
        grads=tuple(sorted(draw(st.sets(st.sampled_from(sorted(wanted)))))),
        spread=draw(st.sampled_from((0.1, 1.0, 10.0))),
        **fields,
    )


@given(case=cases(), deterministic=st.booleans())
def test_any_combination(backend: str, case: Case, deterministic: bool) -> None:
    drawn = problem(case)
    assume(refusal(drawn, backend) is None)
    check(run(drawn, backend, deterministic=deterministic), drawn)
