"""Attention by name. Shapes: B batch, H heads, L queries, M keys, K and V their and values' width in a head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Queries = Float[Array, "B H L K"]
Keys = Float[Array, "B H M K"]
Values = Float[Array, "B H M V"]
Attended = Float[Array, "B H L V"]
# A bias of scores as products: of a number of each query and one of each key.
Factors = tuple[Float[Array, "B L"], Float[Array, "B M"]]
AttentionFn = Callable[..., Array]  # of queries, keys, values, and factors if there are any

# A CPU makes this many float32 scores at once fastest all together; more, a head or a few queries at a time.
_CPU_SCORES = 1 << 20


def dot_product(
    q: Queries, k: Keys, v: Values, factors: Factors | None = None, *, bias: Float[Array, "... L M"] | None = None,
    scale: float | None = None,
) -> Attended:  # fmt: skip
    """Softmax attention written out: float32 scores, no mask but ``factors``, or ``bias`` of all heads or rows or of
    each."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = _product(factors) if factors is not None else bias
    scores = jnp.einsum("bhlk,bhmk->bhlm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    # Softmax with its division last: by K columns and not by M.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (
        jnp.einsum("bhlm,bhmk->bhlk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    ).astype(v.dtype)


def _product(factors: Factors) -> Float[Array, "B 1 L M"]:
    """The bias that they are the factors of."""
    of_queries, of_keys = factors
    return of_queries[:, None, :, None] * of_keys[:, None, None, :]


def _with_channel(x: Array, numbers: Float[Array, "B L"]) -> Array:
    """``[B, H, L, K + 1]``: queries or keys with their factors of a bias as one channel more."""
    channel = jnp.broadcast_to(numbers[:, None, :, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, channel.astype(x.dtype)], axis=-1)


def blocked(q: Queries, k: Keys, v: Keys, factors: Factors | None = None) -> Queries:
    """``dot_product``, a (batch, head) pair or a block of queries at a time.

    For the CPU, where many scores cost twice the time, and for long sequences whose ``[L, M]`` scores would not
    fit in memory.
    """
    b, h, l, d = q.shape
    m = k.shape[2]
    if b * h * l * m <= _CPU_SCORES:
        return dot_product(q, k, v, factors)
    scale = 1 / math.sqrt(d)
    if factors is not None:
        q, k = _with_channel(q, factors[0] / scale), _with_channel(k, factors[1])
    block = l
    while block * m > 4 * _CPU_SCORES and block % 2 == 0:
        block //= 2
    q = q.reshape(b * h, l // block, block, -1)
    k, v = k.reshape(b * h, 1, m, -1), v.reshape(b * h, 1, m, d)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        def one(q: Array) -> Array:
            return dot_product(q[None, None], k[None], v[None], scale=scale)[0, 0]

        return jax.lax.map(one, q) if q.shape[0] > 1 else one(q[0])[None]

    return jax.lax.map(head, (q, k, v)).reshape(b, h, l, d)


def cudnn(q: Queries, k: Keys, v: Keys, factors: Factors | None = None) -> Queries:
    """cuDNN's fused attention (the kernels TransformerEngine calls too); bfloat16 or float16. A bias is written down:
    most GPUs have no kernel for a channel more."""
    bias = None if factors is None else _product(factors).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn").swapaxes(1, 2)


def splash(
    q: Queries, k: Keys, v: Keys, factors: Factors | None = None, *, chip: str = "",
    blocks: Mapping[str, int] | None = None, interpret: bool = False,
) -> Queries:  # fmt: skip
    """Splash attention (Pallas, TPU). Tokens are padded to a whole number of blocks and masked out
    with segment ids; ``blocks``: sizes that are not to be chosen."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    heads, length, width = q.shape[1:]
    sizes = splash_blocks(k.shape[2], chip, blocks, factors is not None)
    sizes |= {"block_q": splash_blocks(length, chip, blocks)["block_q"]}
    over = [-x.shape[2] % sizes[block] for x, block in ((q, "block_q"), (k, "block_kv"))]
    mask = masks.MultiHeadMask([masks.FullMask((length + over[0], k.shape[2] + over[1])) for _ in range(heads)])
    # Keys and values as the compiler's products with kernels leave them, tokens last: it would otherwise make these
    # at half the peak, and turn them around (FLUX.1 on a v6e: 18 of 165 ms a step, estimated). The kernel multiplies
    # from either side. Queries it would turn around in each block, so they come with tokens first.
    layouts = {"k_layout": kernel.QKVLayout.SEQ_MINOR, "v_layout": kernel.QKVLayout.SEQ_MINOR}
    block_sizes = kernel.BlockSizes(**cast(dict[str, Any], sizes | layouts))
    attend = kernel.make_splash_mha(mask, block_sizes=block_sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    real = [jnp.pad(jnp.ones(x.shape[2], jnp.int32), (0, n)) for x, n in zip((q, k), over, strict=True)]
    ids = kernel.SegmentIds(q=real[0], kv=real[1])
    q = q / math.sqrt(width)
    if factors is not None:
        q, k = map(_with_channel, (q, k), factors)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0))) for x, n in ((q, over[0]), (k, over[1]), (v, over[1])))
    return jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, ids)[:, :, :length].astype(v.dtype)


def splash_blocks(
    length: int, chip: str = "", given: Mapping[str, int] | None = None, wide: bool = False
) -> dict[str, int]:  # fmt: skip
    """Block sizes that divide the padded length with the least padding, queries first. ``chip``: JAX's name of the
    device; more than 256 keys at once do not fit the vector memory of "TPU v4", or more than 128 that are ``wide``, of
    more than 128 channels. The others need the larger limit (``xla_tpu_scoped_vmem_limit_kib``) that conf/hardware
    gives them. ``given``: some that are settled, in multiples of 128; the rest goes with them, as block_kv must be a
    multiple of block_kv_compute.

    Measured for FLUX: 2304/2304/768 is best at 4,608 tokens and 2176 at 4,352 on v6e; blocks that
    do not divide cost a whole extra block (2176 at 4,608 pads to 6,528: 2.5 times the time).
    """
    padded = -(-length // 128) * 128
    size = max(s for s in range(128, min(padded, 2304) + 1, 128) if padded % s == 0)
    given = given or {}
    kv, compute = given.get("block_kv", size), given.get("block_kv_compute")
    if compute is None:
        most = 768 if chip != "TPU v4" else 128 if wide else 256
        compute = max(s for s in range(128, min(kv, most) + 1, 128) if kv % s == 0)
    elif "block_kv" not in given:
        kv = compute * max(1, size // compute)
    return {"block_q": given.get("block_q", size), "block_kv": kv, "block_kv_compute": compute}


def chosen(name: str, platform: str, dtype: str) -> str:
    """What ``auto`` stands for there; any other name stands for itself."""
    best = {"gpu": "cudnn_flash_te" if dtype != "float32" else "dot_product", "tpu": "flash"}
    return best.get(platform, "dot_product") if name == "auto" else name


def by_name(
    name: str, platform: str, dtype: str, blocks: Mapping[str, int] | None = None, chip: str = ""
) -> AttentionFn:
    """The attention called ``name`` on this ``platform`` (cpu, gpu, tpu) for activations of ``dtype``; ``chip`` is
    JAX's name of the device.

    Raises ValueError when the hardware cannot serve the name: never a silent fall-back.
    """
    half, name = dtype != "float32", chosen(name, platform, dtype)
    serves = {"flash": "tpu", "cudnn_flash_te": "gpu"}
    if name in serves and platform != serves[name]:
        raise ValueError(
            f"hardware.attention={name} needs a {serves[name].upper()}, this is a {platform.upper()}: "
            "use attention=dot_product or attention=auto")  # fmt: skip
    if name == "cudnn_flash_te" and not half:
        raise ValueError(f"hardware.attention={name} needs activations_dtype=bfloat16 or float16, got {dtype}")
    if name == "flash":
        return functools.partial(splash, chip=chip, blocks=blocks)
    if name == "cudnn_flash_te":
        return cudnn
    return blocked if platform == "cpu" else dot_product
