"""What the models are made of. Shapes: B batch, L tokens, D width, H heads, K head width.

Activations keep the dtype they arrive in and weights are cast to it, so a model's compute dtype
is the dtype of its inputs; norms, softmax, rotary angles and timesteps are float32 throughout.

Every parameter is declared on one line: shape, logical axes, initializer. Matrices are stored
``[out, in]`` as checkpoints have them (a host transpose of bfloat16 runs at 0.2 GB/s) and the
compiled program contracts over ``in``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Axis, Layout

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

EIGHT_BITS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # dtype → its largest number

fan_in = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
ones = jax.nn.initializers.ones
zeros = jax.nn.initializers.zeros
normal = jax.nn.initializers.normal


def param(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], axes: tuple[Axis, ...], init: Initializer = fan_in, **facts: Any
) -> nnx.Param[Any]:
    """A parameter with its logical axes; ``distributed/mesh.py`` says which mesh axis each lies on.

    Without ``rngs`` it has a shape and no value, here and in all modules below: tracing what would draw the values
    takes far longer than to note the shapes.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    value = jax.ShapeDtypeStruct(shape, jnp.float32) if rngs is None else init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, **facts)


class LowRank(nnx.Module):
    """What low-rank adapters add to a linear layer, to each row of a batch in its own proportion:
    ``((x Aᵀ) · s) Bᵀ`` with the ranks of all adapters side by side.

    ``ranks``: how many of the ranks each adapter has. ``rows`` holds s ``[B, R]`` and is put in by
    ``set_rows`` while a program is traced, so scales are data.
    """

    def __init__(self, a: Array, b: Array, ranks: tuple[int, ...], axes: tuple[Axis, Axis] = (None, None)):
        """``axes``: those of the layer that it stands beside, outputs first."""
        self.a, self.b, self.ranks = nnx.Param(a, axes=(None, axes[1])), nnx.Param(b, axes=(axes[0], None)), ranks
        self.rows: nnx.Variable[Any] | None = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """``[B, …, in]`` → ``[B, …, out]``."""
        y = x @ self.a[...].astype(x.dtype).T
        assert self.rows is not None  # set_rows
        rows = self.rows[...].astype(x.dtype)
        return (y * rows.reshape(rows.shape[0], *[1] * (x.ndim - 2), -1)) @ self.b[...].astype(x.dtype).T


def set_rows(model: nnx.Module, scales: Array) -> nnx.Module:
    """Gives every ``LowRank`` of ``model`` the scale of each row and adapter, ``[B, adapters]``."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LowRank):
            ranks = np.repeat(np.arange(len(module.ranks)), module.ranks)
            rows = scales[:, ranks]
            layers = module.a[...].shape[:-2]
            module.rows = nnx.Variable(jnp.broadcast_to(rows, (*layers, *rows.shape)))
    return model


class Linear(nnx.Module):
    """``y = x Wᵀ + b``: ``[..., in]`` → ``[..., out]``, or ``[B, L, in]`` → ``[B, H, L, K]``.

    A kernel in eight bits has a ``scale`` ``[out]`` beside it, put there by ``weights/load.py``: the product is of the
    numbers as they are, cast to the activations' dtype, and each output is multiplied by its scale. Where the scale is
    marked with ``products``, each token is brought to the kernel's dtype too, and the product is of eight bits.
    """

    def __init__(
        self, d_in: int, d_out: int, axes: tuple[Axis, Axis], *, bias: bool = True, rngs: nnx.Rngs | None,
        init: Initializer = fan_in, tokens: bool = True, heads: int | None = None,
    ):  # fmt: skip
        """``tokens``: what it reads; False where it is one vector a row, of which no product is worth eight bits.
        ``heads``: that its outputs belong to, where ``to_heads`` makes them."""
        self.tokens = tokens
        self.kernel = param(rngs, (d_out, d_in), axes, init, heads=heads)
        self.bias = param(rngs, (d_out,), axes[:1], zeros) if bias else None
        self.scale: nnx.Param[Any] | None = nnx.data(None)
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, *parts: Array, layout: Layout = Layout()) -> Array:
        """Of what ``parts`` are side by side. Each is brought to eight bits before it is joined: half the bytes."""

        def joined(parts: Sequence[Array]) -> Array:
            return parts[0] if len(parts) == 1 else layout.join(parts, -1, "mlp")

        read, size = self._read(*parts)
        x = joined(read)
        y = self._product("...i,oi->...o", x, self.kernel[...].reshape(-1, x.shape[-1]))
        y = self._finished(y, size, parts[0].dtype, (-1,))
        return y if self.lora is None else y + self.lora(joined(parts))

    def to_heads(self, x: Array, heads: int, split_head_dim: bool = True) -> Array:
        """``[B, L, in]`` → ``[B, H, L, K]``. ``split_head_dim`` contracts straight into heads-major
        layout (no transpose of activations); otherwise the flat product is reshaped."""
        if not split_head_dim:
            return split_heads(self(x), heads)
        (read,), size = self._read(x)
        y = self._product("bld,hkd->bhlk", read, self.kernel[...].reshape(heads, -1, x.shape[-1]))
        y = self._finished(y, None if size is None else size[:, None], x.dtype, (heads, 1, -1))
        return y if self.lora is None else y + split_heads(self.lora(x), heads)

    def _read(self, *parts: Array) -> tuple[Sequence[Array], Array | None]:
        """What is multiplied, and the sizes of its tokens if they are in eight bits."""
        if self.scale is None or not self.tokens or not self.scale.get_metadata().get("products"):
            return parts, None
        return tokens_in(self.kernel[...].dtype, *parts)

    def _product(self, subscripts: str, x: Array, kernel: Array) -> Array:
        """Of integers it would leave float16, and be rounded twice in bfloat16, if it were not wide."""

        def into(dtype: Any) -> Callable[[Array, Array], Array]:
            return functools.partial(jnp.einsum, subscripts, preferred_element_type=dtype)

        def wide(x: Array, kernel: Array) -> Array:
            return into(jnp.float32)(x, kernel).astype(x.dtype)

        kernel = kernel.astype(x.dtype)
        if self.scale is not None:
            return into(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)(x, kernel)
        if x.dtype != jnp.bfloat16:
            return into(None)(x, kernel)
        # XLA:CPU's library multiplies bfloat16 into float32 alone.
        return jax.lax.platform_dependent(x, kernel, cpu=wide, default=into(None))

    def _finished(self, y: Array, size: Array | None, dtype: Any, shape: tuple[int, ...]) -> Array:
        """The product scaled, if it is to be, and with its bias, in float32; ``shape``: of outputs beside ``y``.

        In bfloat16 XLA:GPU would have cuBLAS add the bias, and then copy each layer's weights out of their stack, 35 GB
        a step of FLUX.1, where a plain product reads them in place.
        """
        if self.scale is not None:
            y = y.astype(jnp.float32) * self.scale[...].reshape(shape)
        if size is not None:
            y = y * size
        if self.bias is not None:
            y = y.astype(jnp.float32) + self.bias[...].astype(jnp.float32).reshape(shape)
        return y.astype(dtype)


def tokens_in(dtype: Any, *parts: Array) -> tuple[list[Array], Array]:
    """Tokens whose parts are ``[..., D]`` in eight bits, and the float32 size ``[..., 1]`` of each token: its largest
    magnitude becomes the largest number of ``dtype``. A token that is not finite has products that are not."""
    limit = EIGHT_BITS[dtype.name]
    most = [jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) for x in parts]
    largest = functools.reduce(jnp.maximum, most)
    factor = limit / jnp.where(largest == 0, 1, largest)  # a TPU divides far more slowly
    scaled = [x.astype(jnp.float32) * factor for x in parts]
    return [(jnp.round(x) if dtype == jnp.int8 else x).astype(dtype) for x in scaled], largest / limit


def split_heads(x: Array, heads: int) -> Array:
    """``[B, L, H·K]`` → ``[B, H, L, K]``."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def from_heads(x: Array) -> Array:
    """``[B, H, L, K]`` → ``[B, L, H·K]``."""
    return jax.lax.platform_dependent(x, tpu=side_by_side, default=transposed)


def transposed(x: Array) -> Array:
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def side_by_side(x: Array) -> Array:
    """The same for a TPU, which would transpose twice."""
    return jnp.concatenate([x[:, head] for head in range(x.shape[1])], axis=-1)


class Embedding(nnx.Module):
    """``[...]`` token ids → ``[..., D]``."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs | None):
        self.table = param(rngs, (vocab, width), ("vocab", "embed"), normal(0.02))

    def __call__(self, ids: Array, dtype: Any) -> Array:
        return self.table[...][ids].astype(dtype)


def _apart(x: Array) -> Array:
    """``x``; on an NVIDIA GPU a kernel ends with it.

    Before jax 0.12 XLA:GPU would write normed queries and keys as float32 and read them again to rotate them: a step of
    FLUX.1 would move 46 GB beside products and attention, and not 39 (36 with 0.12, which norms and rotates at once).
    """
    return (
        x
        if jax.__version_info__ >= (0, 12)
        else jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)
    )


class RMSNorm(nnx.Module):
    """Scale-only norm over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs | None, axis: Axis = None):
        self.scale = param(rngs, (width,), (axis,), ones)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * _apart(jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps))
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """Norm over the last axis without parameters; returns float32."""
    if x.dtype == jnp.float32:
        return norm_in_two_readings(x, eps=eps)
    one, two = (functools.partial(norm, eps=eps) for norm in (norm_in_one_reading, norm_in_two_readings))
    return jax.lax.platform_dependent(x, tpu=one, default=two)


def norm_in_two_readings(x: Array, *, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


def norm_in_one_reading(x: Array, *, eps: float) -> Array:
    """The same for a TPU and half precision: cancelling costs far less than ``x`` was rounded by. (A GPU would move
    3 GB more in a step of FLUX.1, as XLA 0.10 compiles it.)"""
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(y * y, axis=-1, keepdims=True) - mean * mean, 0)
    return (y - mean) * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Norm over the last axis with scale and bias, in float32."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs | None):
        self.scale = param(rngs, (width,), (None,), ones)
        self.bias = param(rngs, (width,), (None,), zeros)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return (layer_norm(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


def stack(count: int, make: Callable[[nnx.Rngs | None], nnx.Module], rngs: nnx.Rngs | None) -> nnx.Module | None:
    """``count`` modules of one kind as one module whose parameters have a leading layer axis.

    One compiled body then serves all layers (57 blocks would compile for minutes).
    """
    if count == 0:
        return None
    if rngs is None:
        graph, state = nnx.split(make(None))
        return nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state))
    build = nnx.vmap(make, in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=count)(build)(rngs)


def scan(
    layers: nnx.Module | None, call: Callable[..., Any], carry: Any, layout: Layout, beside: Any = None,
    part: slice = slice(None),
) -> Any:  # fmt: skip
    """Folds ``carry = call(layer, carry, own)`` over the layers of a ``stack``, each with its own of the
    arrays ``beside`` ``[layers, …]``; without them ``call(layer, carry)``. ``part``: of the layers."""
    if layers is None:
        return carry
    graph, state = nnx.split(layers)
    if not layout.divides_weights:
        state = jax.tree.map(_by_heads, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    places = range(len(jax.tree.leaves(state)[0]))[part]

    def turn(i: Array, carry: Any) -> Any:
        layer, own = jax.tree.map(lambda x: _taken(x, i), (state, beside))
        return call(nnx.merge(graph, gathered(layer, layout)), carry, *([] if beside is None else [own]))

    return jax.lax.fori_loop(places.start, places.stop, turn, carry)


def _taken(stacked: Array, i: Array) -> Array:
    """``stacked[i]``."""
    plain = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    if stacked.dtype != jnp.bfloat16 or jax.__version_info__ >= (0, 12):
        return plain(stacked, i)

    def bits(stacked: Array, i: Array) -> Array:  # before jax 0.12 XLA:CPU would make each number float32, and back
        taken = plain(jax.lax.bitcast_convert_type(stacked, jnp.uint16), i)
        return jax.lax.bitcast_convert_type(taken, jnp.bfloat16)

    return jax.lax.platform_dependent(stacked, i, cpu=bits, default=plain)


def _by_heads(leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
    """The kernels ``[layers, H·K, in]`` of a stack as ``[layers, H, K, in]``, if their outputs are of heads: a layer's
    own is then read where it lies, where XLA would copy it to reshape it (FLUX.1 on a v6e: 8 ms a step, estimated)."""
    heads, value = leaf.get_metadata().get("heads"), leaf.get_value()
    return leaf if heads is None else leaf.replace(value.reshape(len(value), heads, -1, value.shape[-1]))


def each(layers: nnx.Module, call: Callable[..., Array], layout: Layout) -> Array:
    """``call(layer)`` of all layers of a ``stack``: ``[layers, …]``."""
    graph, state = nnx.split(layers)

    def one(i: Array) -> Array:
        return call(nnx.merge(graph, gathered(jax.tree.map(lambda x: _taken(x, i), state), layout)))

    return jax.lax.map(one, jnp.arange(len(jax.tree.leaves(state)[0])))


def gathered(state: Any, layout: Layout) -> Any:
    """The parameters of a module as it computes with them: whole, where FSDP has divided them."""

    def whole(leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
        axes = leaf.get_metadata().get("axes")
        return leaf if axes is None else leaf.replace(layout.gathered(leaf.get_value(), axes))

    return jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def gelu_erf(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) · up``, in float32 so that bfloat16 rounds once."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)
