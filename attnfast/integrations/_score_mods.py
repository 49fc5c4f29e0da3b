"""What a ``score_mod`` of FlexAttention does to a score, found by calling it once.

The function is given a `Score`, which records what is done to it, and positions that broadcast,
whose differences remember that they are distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..requirements import fail

WAYS = (
    "made of score * number, c * torch.tanh(score / c), score + (what depends on b, h, q and k"
    " alone) and torch.where(..., score, -inf), in this order"
)


class Edits(NamedTuple):
    """A score_mod as `attention` has it.

    Attributes:
        factor: What the scaled scores are multiplied with.
        softcap: Of these; None: none.
        bias: What is added, broadcastable to ``(B, H, T, S)``; None: nothing.
        slopes: float32 ``(H,)`` or ``(B, H)``: taken off is the slope times the distance, |q - k|
            or, unless ``absolute``, q - k; None: nothing.
        absolute: Which of both.
        distances: What the slopes take off, as a tensor.
    """

    factor: float
    softcap: float | None
    bias: Tensor | None
    slopes: Tensor | None
    absolute: bool
    distances: Tensor | None

    def with_distances(self) -> Tensor | None:
        """The bias with what the slopes take off in it."""
        terms = [_floating(x) for x in (self.bias, self.distances) if x is not None]
        return sum(terms[1:], terms[0]) if terms else None


def edits_of(
    function: str,
    score_mod: Callable[..., Any],
    sizes: tuple[int, int, int, int],
    device: torch.device,
) -> Edits:
    """What a function does to a score.

    Args:
        function: Who asks, for messages.
        score_mod: ``score_mod(score, b, h, q, k)``.
        sizes: B, H, T and S.
        device: Of the positions.

    Raises:
        ValueError: It does something that our kernels do not.
    """
    places = []
    for dim, size in enumerate(sizes):
        shape = [1] * 4
        shape[dim] = size
        places.append(torch.arange(size, device=device).view(shape))
    b, h, q, k = places
    try:
        result = score_mod(Score(function), b, h, Position.of(q, "q"), Position.of(k, "k"))
    except (TypeError, RuntimeError, IndexError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{function}: score_mod must be {WAYS}, got {got}") from error
    if not isinstance(result, Score):
        fail(function, "score_mod", WAYS, f"a result of type {type(result).__name__}")
    return result.edits(sizes, device)


class Position(Tensor):
    """Positions of queries or keys, or a multiple of their distance, which says so.

    Attributes:
        form: "q", "k", "q - k" or "|q - k|".
        multiple: A number, or a tensor that does not depend on q or k.
    """

    form: str
    multiple: Any

    @staticmethod
    def of(x: Tensor, form: str, multiple: Any = 1) -> Position:
        """A tensor with its form."""
        found: Position = x.as_subclass(Position)
        found.form, found.multiple = form, multiple
        return found

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The plain result; a distance's where it is one."""
        if any(issubclass(kind, Score) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*map(plain, args), **{n: plain(x) for n, x in (kwargs or {}).items()})
        result = plain(result)
        form = (
            _form(getattr(function, "__name__", ""), args) if isinstance(result, Tensor) else None
        )
        return result if form is None else Position.of(result, *form)


def _form(name: str, args: tuple[Any, ...]) -> tuple[str, Any] | None:
    """Of a function's result, if it is a distance."""
    name = name.strip("_")
    x, y = (*args, None)[:2]
    if name in ("sub", "subtract", "rsub") and isinstance(x, Position) and isinstance(y, Position):
        if name == "rsub":
            x, y = y, x
        forms = (x.form, y.form)
        return ("q - k", 1 if forms == ("q", "k") else -1) if set(forms) == {"q", "k"} else None
    if name in ("mul", "multiply", "rmul", "truediv", "div", "divide"):
        distance, other = (x, y) if isinstance(x, Position) else (y, x)
        divides = name not in ("mul", "multiply", "rmul")
        if (
            isinstance(other, Position)
            or distance.form in ("q", "k")
            or (divides and distance is y)
        ):
            return None
        if isinstance(other, Tensor) and other.dim() > 1 and other.shape[-2:] != (1, 1):
            return None
        if isinstance(other, Tensor) and other.dim() == 1 and other.numel() != 1:
            return None
        multiple = distance.multiple / other if divides else distance.multiple * other
        return distance.form, multiple
    if not isinstance(x, Position) or x.form in ("q", "k"):
        return None
    if name in ("abs", "absolute") and not isinstance(x.multiple, Tensor) and abs(x.multiple) == 1:
        return "|q - k|", 1
    if name in ("neg", "negative"):
        return x.form, -x.multiple
    if name in ("float", "to", "type", "double", "bfloat16", "half"):
        return x.form, x.multiple
    return None


class Score:
    """A score to which things are done: ``inner * s`` or ``outer * tanh(inner * s)``, and more."""

    dtype = torch.float32

    def __init__(self, function: str) -> None:
        """The score as it is."""
        self.function = function
        self.inner: float = 1.0
        self.outer: float | None = None
        self.added: list[Any] = []  # tensors that broadcast to the scores, and numbers

    def edits(self, sizes: tuple[int, int, int, int], device: torch.device) -> Edits:
        """What has been done."""
        factor, softcap = self.inner, None
        if self.outer is not None:
            softcap, factor = abs(self.outer), self.inner * self.outer
        slopes, absolute, distances, bias = None, False, None, None
        for term in self.added:
            if slopes is None and isinstance(term, Position):
                slopes = _slopes(term, sizes, device)
                if slopes is not None:
                    absolute, distances = term.form == "|q - k|", plain(term)
                    continue
            x = plain(term) if isinstance(term, Tensor) else torch.tensor(term, device=device)
            bias = _floating(x) if bias is None else bias + x
        return Edits(factor, softcap, bias, slopes, absolute, distances)

    def _copy(self) -> Score:
        copy = Score(self.function)
        copy.inner, copy.outer, copy.added = self.inner, self.outer, list(self.added)
        return copy

    def _refuse(self, what: str) -> NoReturn:
        fail(self.function, "score_mod", WAYS, what)

    def _times(self, factor: Any) -> Score:
        if isinstance(factor, Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = factor.item()
        if isinstance(factor, (Tensor, Score)) or not math.isfinite(factor):
            self._refuse("score times a tensor, or a number that is not finite")
        copy = self._copy()
        if copy.outer is None:
            copy.inner *= factor
        else:
            copy.outer *= factor
        copy.added = [x * factor for x in copy.added]
        return copy

    def _plus(self, term: Any, sign: int = 1) -> Score:
        if isinstance(term, Score):
            self._refuse("a sum of two scores")
        copy = self._copy()
        copy.added.append(term if sign == 1 else -term)
        return copy

    def __mul__(self, other: Any) -> Score:
        """Times a number."""
        return self._times(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Score:
        """By a number."""
        return self._times(1 / other)

    def __add__(self, other: Any) -> Score:
        """A bias."""
        return self._plus(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Score:
        """A bias, taken off."""
        return self._plus(other, -1)

    def __rsub__(self, other: Any) -> Score:
        """Something less the score."""
        return self._times(-1)._plus(other)

    def __neg__(self) -> Score:
        """Times -1."""
        return self._times(-1)

    def __getattr__(self, name: str) -> Any:
        """A method of tensors."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._apply(name, (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """A function of torch's."""
        score: Score = next(x for x in args if isinstance(x, Score))
        name = getattr(function, "__name__", str(function))
        return score._apply(name, args, kwargs or {})

    def _apply(self, name: str, args: tuple[Any, ...], kwargs: Any) -> Score:
        """What a function of torch's makes of scores."""
        name = name.strip("_")
        x, y = (*args, None)[:2]
        first = x is self
        if name == "tanh":
            if self.outer is not None or self.added:
                self._refuse("tanh of a score that is capped or biased already")
            copy = self._copy()
            copy.outer = 1.0
            return copy
        if name in ("float", "to", "type", "type_as", "double"):
            return self
        if name in ("mul", "multiply", "rmul"):
            return self._times(y if first else x)
        if name in ("div", "divide", "true_divide", "truediv") and first:
            return self._times(1 / y)
        if name in ("add", "radd") and not kwargs:
            return self._plus(y if first else x)
        if name in ("sub", "subtract") and not kwargs:
            return self._plus(y, -1) if first else self._times(-1)._plus(x)
        if name == "rsub":
            return self._times(-1)._plus(y)
        if name in ("neg", "negative"):
            return self._times(-1)
        if name == "where" and len(args) == 3:
            return self._where(*args)
        if name == "masked_fill" and first:
            return self._where(torch.logical_not(args[1]), self, args[2])
        return self._refuse(f"{name} of a score")

    def _where(self, condition: Any, x: Any, y: Any) -> Score:
        """One score or another, or a score or -inf."""
        if isinstance(x, Score) and isinstance(y, Score):
            if (x.inner, x.outer) != (y.inner, y.outer):
                self._refuse("torch.where of two scores that differ by more than what is added")
            copy = x._copy()
            sums = [_sum(score.added, condition) for score in (x, y)]
            copy.added = [torch.where(plain(condition), *sums)]
            return copy
        score, other = (x, y) if isinstance(x, Score) else (y, x)
        other = plain(other) if isinstance(other, Tensor) else torch.tensor(other)
        if not bool((other == -torch.inf).all()):
            self._refuse("torch.where of a score and something else than -inf")
        kept = plain(condition) if score is x else ~plain(condition)
        nothing = torch.zeros((), device=kept.device)
        return score._plus(torch.where(kept, nothing, -torch.inf))


def plain(x: Any) -> Any:
    """A tensor that does not know what it is."""
    return x.as_subclass(Tensor) if isinstance(x, Position) else x


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _sum(terms: list[Any], like: Tensor) -> Tensor:
    """All that is added."""
    total = torch.zeros((), device=like.device)
    for term in terms:
        total = total + plain(term)
    return total


def _slopes(
    term: Position, sizes: tuple[int, int, int, int], device: torch.device
) -> Tensor | None:
    """Slopes of a multiple of distances: ``(H,)`` or ``(B, H)``; None where it is not one."""
    B, H, _, _ = sizes
    if term.form not in ("q - k", "|q - k|"):
        return None
    multiple = torch.as_tensor(term.multiple, device=device)
    if multiple.requires_grad:  # slopes have no gradient; a bias has
        return None
    entries = B if multiple.dim() == 4 and multiple.shape[0] > 1 else 1
    slopes = -multiple.float().expand(entries, H, 1, 1)
    slopes = slopes[:, :, 0, 0].contiguous()
    return slopes[0] if len(slopes) == 1 else slopes
