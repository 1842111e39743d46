"""What an adapter does to one weight: LoRA's product, LoHa's Hadamard and LoKr's Kronecker product, a
whole matrix, and DoRA's magnitude around any of them. NumPy, float32; weights are ``[out, in]``.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import numpy as np

Rows = tuple[tuple[int, int], ...]  # ranges of rows, in the target's order


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _cut(x: np.ndarray, rows: Rows) -> np.ndarray:
    return np.concatenate([x[a:b] for a, b in rows]) if len(rows) > 1 else x[slice(*rows[0])]


def _wider(x: np.ndarray, columns: int) -> np.ndarray:
    """``x`` with zeros behind its columns, so that it has so many."""
    return np.pad(x, ((0, 0), (0, columns - x.shape[1])))


def _norm2(a: np.ndarray, b: np.ndarray) -> float:
    """The square of the Frobenius norm of B A."""
    return float(np.vdot(a @ a.T, b.T @ b))


class Delta(abc.ABC):
    """A change of one weight, its own alpha included; the user's scale comes on top."""

    @property
    def merged_only(self) -> str | None:
        """Why it cannot be given to each row in another proportion."""
        return None

    @property
    @abc.abstractmethod
    def rank(self) -> int: ...

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def take(self, rows: Rows) -> Delta:
        """What it does to these rows: a fused layer's adapter is shared by the layers it fuses."""

    def widened(self, inputs: int) -> Delta:
        """The same on a weight that has more inputs, which it does not read."""
        return Whole(_wider(self.full(), inputs))

    @abc.abstractmethod
    def full(self) -> np.ndarray:
        """The change itself, float32."""

    def change(self, old: np.ndarray, scale: float) -> np.ndarray:
        """What is added to the weight ``old`` at this scale."""
        return np.float32(scale) * self.full()

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A ``[R, in]`` and B ``[out, R]`` whose product B A is exactly this; R at most ``min(out, in)``."""
        b, a = _as_product([self.full()])
        return a, b

    def norm2(self) -> float:
        """The square of its Frobenius norm."""
        full = self.full()
        return float(np.vdot(full, full))


@dataclasses.dataclass(frozen=True)
class Product(Delta):
    """LoRA: ``scale · B A``."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    def take(self, rows: Rows) -> Product:
        return dataclasses.replace(self, b=_cut(self.b, rows))

    def widened(self, inputs: int) -> Product:
        return dataclasses.replace(self, a=_wider(self.a, inputs))

    def full(self) -> np.ndarray:
        return (wide(self.b) * np.float32(self.scale)) @ wide(self.a)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        return wide(self.a), wide(self.b) * np.float32(self.scale)

    def norm2(self) -> float:
        return _norm2(*self.factors())


@dataclasses.dataclass(frozen=True)
class Hadamard(Delta):
    """LoHa: ``scale · (W1a W1b) ∘ (W2a W2b)``."""

    w1: tuple[np.ndarray, np.ndarray]  # [out, r], [r, in]
    w2: tuple[np.ndarray, np.ndarray]
    scale: float

    @property
    def rank(self) -> int:
        return self.w1[1].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    def take(self, rows: Rows) -> Hadamard:
        return Hadamard((_cut(self.w1[0], rows), self.w1[1]), (_cut(self.w2[0], rows), self.w2[1]), self.scale)

    def full(self) -> np.ndarray:
        one, two = (wide(a) @ wide(b) for a, b in (self.w1, self.w2))
        return np.float32(self.scale) * one * two

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The products of all pairs of columns, and of rows: rank r²."""
        (b1, a1), (b2, a2) = ([wide(x) for x in pair] for pair in (self.w1, self.w2))
        if len(a1) * len(a2) > min(self.shape):
            return super().factors()
        a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
        return a, (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1) * np.float32(self.scale)

    def norm2(self) -> float:
        return _norm2(*self.factors()) if self.rank <= 8 else super().norm2()


@dataclasses.dataclass(frozen=True)
class Kronecker(Delta):
    """LoKr: ``scale · W1 ⊗ W2``, each whole or the product of two factors."""

    w1: tuple[np.ndarray, ...]  # [a, c], or [a, r] and [r, c]
    w2: tuple[np.ndarray, ...]  # [b, d], likewise
    scale: float
    rows: np.ndarray | None = None  # those of the whole that are meant; None: all

    @property
    def rank(self) -> int:
        return min(math.prod(min(x.shape) for x in (self.w1[0], self.w2[0])), *self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        out = len(self.w1[0]) * len(self.w2[0]) if self.rows is None else len(self.rows)
        return out, self.w1[-1].shape[1] * self.w2[-1].shape[1]

    def take(self, rows: Rows) -> Kronecker:
        every = np.arange(self.shape[0]) if self.rows is None else self.rows
        return dataclasses.replace(self, rows=_cut(every, rows))

    def _of_rows(self, one: np.ndarray, two: np.ndarray) -> np.ndarray:
        """The rows of ``one ⊗ two`` that are meant."""
        if self.rows is None:
            return np.kron(one, two)
        i, k = np.divmod(self.rows, len(two))
        return (one[i][:, :, None] * two[k][:, None, :]).reshape(len(self.rows), -1)

    def full(self) -> np.ndarray:
        return self._of_rows(_whole(self.w1) * np.float32(self.scale), _whole(self.w2))

    def norm2(self) -> float:
        one, two = (np.sum(np.square(_whole(w)), axis=1) for w in (self.w1, self.w2))
        return self.scale**2 * float(np.sum(self._of_rows(one[:, None], two[:, None])))

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """``(U1 V1) ⊗ (U2 V2) = (U1 ⊗ U2)(V1 ⊗ V2)``."""
        if self.rank >= min(self.shape):
            return super().factors()
        (u1, v1), (u2, v2) = (_as_product([wide(x) for x in w]) for w in (self.w1, self.w2))
        return np.kron(v1, v2), self._of_rows(u1 * np.float32(self.scale), u2)


def _whole(w: tuple[np.ndarray, ...]) -> np.ndarray:
    return wide(w[0]) if len(w) == 1 else wide(w[0]) @ wide(w[1])


def _as_product(w: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """U and V with U V = w, as narrow as its shape allows."""
    if len(w) == 2:
        return w[0], w[1]
    out, width = w[0].shape
    return (w[0], np.eye(width, dtype=np.float32)) if width <= out else (np.eye(out, dtype=np.float32), w[0])


@dataclasses.dataclass(frozen=True)
class Whole(Delta):
    """A difference that was not taken apart: of a matrix, or of a bias or a norm's scale ``[n]``."""

    value: np.ndarray
    scale: float = 1.0

    @property
    def merged_only(self) -> str | None:
        return None if self.value.ndim == 2 else "it changes biases or norms"

    @property
    def rank(self) -> int:
        return min(self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def take(self, rows: Rows) -> Whole:
        return dataclasses.replace(self, value=_cut(self.value, rows))

    def widened(self, inputs: int) -> Whole:
        return dataclasses.replace(self, value=_wider(self.value, inputs))

    def full(self) -> np.ndarray:
        return wide(self.value) * np.float32(self.scale)


class Replacement(Whole):
    """A new value for a parameter, at any scale."""

    merged_only = "it replaces weights"

    def change(self, old: np.ndarray, scale: float) -> np.ndarray:
        return self.full() - old


@dataclasses.dataclass(frozen=True)
class Decomposed(Delta):
    """DoRA: the changed weight's rows (or columns) get lengths of their own.

    With ``inside`` the user's scale multiplies the inner change before the lengths are taken, as
    PEFT does; else it leads from the old weight to the new one in a straight line, as ComfyUI does.
    At scale 1 they agree.
    """

    inner: Delta
    magnitude: np.ndarray  # [out, 1] or [1, in]
    inside: bool
    # Of a part of a fused layer with a length for each input: those of the whole's columns, changed at a scale.
    columns: Callable[[float], np.ndarray] | None = None

    merged_only = "it is a DoRA: its lengths depend on the weights it is merged into"

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def take(self, rows: Rows) -> Decomposed:
        magnitude = _cut(self.magnitude, rows) if self.magnitude.shape[1] == 1 else self.magnitude
        return dataclasses.replace(self, inner=self.inner.take(rows), magnitude=magnitude)

    def widened(self, inputs: int) -> Decomposed:
        magnitude = self.magnitude if self.magnitude.shape[1] == 1 else _wider(self.magnitude, inputs)
        return dataclasses.replace(self, inner=self.inner.widened(inputs), magnitude=magnitude)

    def full(self) -> np.ndarray:
        return self.inner.full()

    def norm2(self) -> float:
        return self.inner.norm2()

    def change(self, old: np.ndarray, scale: float) -> np.ndarray:
        at = scale if self.inside else 1.0
        new = old + self.inner.change(old, at)
        axis = 1 if self.magnitude.shape[1] == 1 else 0
        lengths = self.columns(at) if self.columns else np.sqrt(np.sum(np.square(new), axis=axis, keepdims=True))
        new *= wide(self.magnitude) / np.maximum(lengths, np.finfo(np.float32).tiny)
        new -= old
        return new if self.inside else np.float32(scale) * new
