"""What the programs call of a family's denoiser and decoder, and the pytrees that they hand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.step_cache import StepCache

Conditioning = Any  # a NamedTuple of arrays [B, …]: what a prompt encodes to
StepInputs = Any  # a pytree of arrays [B, S, …]: what depends on the step and not on the image
Positions = Any  # a pytree of arrays without a batch axis


class Denoiser(Protocol):
    """A transformer as the programs use it."""

    def step_inputs(self, conditioning: Conditioning, sigmas: jax.Array, guidance: jax.Array, dtype: Any) -> StepInputs:
        """Of S steps between noise levels ``[B, S + 1]``, and guidance ``[B]``."""

    def drop_step_layers(self) -> None:
        """Take out the layers that only ``step_inputs`` needs."""

    def embed(self, conditioning: Conditioning, positions: Positions, dtype: Any) -> Any:
        """What of the conditioning is the same in all steps."""

    def embed_references(self, tokens: jax.Array, positions: Positions) -> Any:
        """``[B, R, C]`` latents of reference pictures → what ``velocity`` reads of them."""

    def velocity(
        self,
        latents: jax.Array,
        embedded: Any,
        step: StepInputs,
        positions: Positions,
        references: Any = None,
    ) -> jax.Array:
        """``[B, L, C]`` of ``latents`` ``[B, L, C]``; ``step``: of one step, without the axis S."""


class CachedDenoiser(Denoiser, Protocol):
    """One that can skip most of a step: ``step_caches`` of its family."""

    def fresh_cache(self, latents: jax.Array, dtype: Any) -> StepCache:
        """Before the first step of ``latents`` ``[B, L, C]``."""

    def cached_velocity(
        self,
        latents: jax.Array,
        embedded: Any,
        step: StepInputs,
        positions: Positions,
        cache: StepCache,
        threshold: jax.Array,
        live: jax.Array,
    ) -> tuple[jax.Array, StepCache]:
        """``velocity``, and the cache of the next step; ``live`` ``[B]``: rows that have this step."""


@dataclasses.dataclass(frozen=True)
class StreamParts:
    """A transformer in parts that pass through the device one at a time: its blocks, in order, and the layers that make
    their step inputs, which pass first."""

    blocks: tuple[tuple[str, int], ...]  # (stack, number of layers)
    # stack → paths of its blocks' step layers; none where blocks share what a step needs
    step_layers: Mapping[str, tuple[str, ...]]
    # one block (without step layers) or step layer, by path
    makers: Mapping[str, Callable[[nnx.Rngs | None], nnx.Module]]
    rest: Callable[[nnx.Rngs | None], nnx.Module]  # what lies in no block
    # stacks whose blocks are the same in all steps, the first ones in order → the field that they make of what
    # ``block`` hands on, which then is a NamedTuple
    still: Mapping[str, str] = dataclasses.field(default_factory=dict)
    references: tuple[str, ...] = ()  # stacks that only reference pictures pass


class StreamedDenoiser(Denoiser, Protocol):
    """The same for blocks that come one at a time."""

    def stream(self) -> StreamParts: ...

    def step_vector(
        self, conditioning: Conditioning, sigmas: jax.Array, guidance: jax.Array, dtype: Any
    ) -> tuple[Any, Any]:
        """What step layers read, if there are any, and the step inputs ``[B, S, …]``, a pytree, of ``finish`` and of
        all blocks."""

    def embed_tokens(self, latents: jax.Array, conditioning: Conditioning, positions: Positions, dtype: Any) -> Any:
        """What the first block reads. ``latents``: ``[B, L, C]``, with those of reference pictures behind."""

    def block(self, block: nnx.Module, x: Any, step: Sequence[jax.Array], shared: Any, positions: Positions) -> Any:
        """``x`` after ``block``; of one step: the outputs of its step layers, and what all blocks share."""

    def finish(self, x: Any, shared: Any) -> jax.Array:
        """``x`` after the last block → velocity ``[B, L, C]`` of all that ``embed_tokens`` read."""


class Pictures(NamedTuple):
    """What the denoiser reads of the pictures of a batch's rows, float32; None for what their mode has not."""

    start: Any = None  # [B, L, C], latents to begin with, and to keep outside the mask
    mask: Any = None  # [B, L, C], 1 where the image is drawn anew
    channels: Any = None  # [B, L, C'], beside the channels of the latents
    references: Any = None  # [B, R, C], more tokens


class Decoder(Protocol):
    """The component that makes pictures, as ``programs.decode`` uses it."""

    layout: Layout  # that it was made with

    def __call__(self, latents: jax.Array) -> jax.Array:
        """What ``Family.unpack`` gives → ``[B, height, width, 3]`` in -1..1."""
