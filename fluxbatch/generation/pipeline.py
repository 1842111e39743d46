"""The programs of ``programs.py``, compiled and run: encode, denoise, decode. The only place that jits.

Everything that differs from row to row is an argument (prompts, noise, schedule, guidance), so there
is one compilation per image size, batch size and text length.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxbatch.distributed.mesh import batch_sharding, put, replicated
from fluxbatch.generation import programs, sampling
from fluxbatch.lora.apply import Loras
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.flux1.transformer import FluxConfig, rope_table
from fluxbatch.types import Row
from fluxbatch.weights.block_streaming import StreamedFlux
from fluxbatch.weights.device_weights import Network
from fluxbatch.weights.load import Progress


class Watcher:
    """What a pipeline tells while it runs. This one tells nobody."""

    def loading(self, total: int) -> AbstractContextManager[Progress]:
        """Within it ``total`` bytes are read, and what it yields is told of them."""
        return contextlib.nullcontext(lambda count: None)

    def streaming(self) -> AbstractContextManager[Progress]:
        """As ``loading``, in a thread while the devices compute."""
        return contextlib.nullcontext(lambda count: None)

    def compiling(self) -> AbstractContextManager[None]:
        """Within it nothing happens but a wait for the compiler."""
        return contextlib.nullcontext()

    def launched(self, since: float, outputs: Any, pictures: bool) -> None:
        """``since`` a monotonic time the devices have had programs to run, until ``outputs`` are there; ``pictures``:
        to draw some, and not to encode texts."""


class Pipeline:
    """Runs batches of rows; returns device arrays without waiting for them."""

    def __init__(
        self, networks: Mapping[str, Network], flux: FluxConfig, vae: VaeConfig, mesh: jax.sharding.Mesh, dtype: Any,
        schedule: sampling.Schedule, watcher: Watcher, lora: Loras | None = None,
    ):  # fmt: skip
        """``networks``: t5, clip, flux and vae. ``lora``: the adapters that stand beside the weights, mixed
        row by row."""
        self.networks, self.flux_config, self.vae_config = networks, flux, vae
        self.mesh, self.dtype, self.schedule, self.watcher, self._lora = mesh, jnp.dtype(dtype), schedule, watcher, lora
        self._compiled: dict[Hashable, Future[list[Future[Any]]]] = {}
        self._since: float | None = None  # when the devices got the first program of those under way
        self._pictures: Any = None  # the last ones, perhaps still to be drawn

        def jit(function: Callable[..., Any], **options: Any) -> Any:
            function = functools.partial(function)  # of its own, so that its programs go with this pipeline
            return jax.jit(function, out_shardings=batch_sharding(mesh), **options)

        self._encode = jit(programs.encode, static_argnames=("clip_graph", "t5_graph", "dtype"))
        self._modulate = jit(programs.modulate, static_argnames=("graph", "dtype"))
        self._denoise = jit(programs.denoise, static_argnames=("graph", "dtype"), donate_argnames="latents")
        self._condition = jit(programs.condition, static_argnames=("graph", "dtype"))
        self._layer = jit(programs.layer, static_argnames="graph")
        self._embed = jit(programs.embed, static_argnames=("graph", "dtype"))
        self._block = jit(programs.block, static_argnames=("block_graph", "graph"))
        self._step = jit(programs.step, static_argnames="graph", donate_argnames="latents")
        platform = mesh.devices.flat[0].platform
        decode, options = functools.partial(programs.decode, at_once=programs.pixels_at_once(platform)), programs.decoder_options(platform, vae)
        self._decode = jit(decode, static_argnames=("graph", "dtype", "height", "width"), compiler_options=options)

    @property
    def multiple(self) -> int:
        """Heights and widths must be whole numbers of packed tokens: this many pixels."""
        return 2 * self.vae_config.scale

    def encode(self, clip_ids: np.ndarray, t5_ids: np.ndarray, rows: Sequence[Row]) -> tuple[jax.Array, jax.Array]:
        """Ids ``[B, 77]``, ``[B, T]`` of rows → T5 states ``[B, T, D]`` and pooled vectors ``[B, P]``."""
        if not self.networks["t5"].here:
            jax.block_until_ready(self._pictures)
            self.networks["flux"].leave()  # where there is no room for both
        (clip, clip_state), (t5, t5_state) = self._ready("clip", "t5", program="encode")
        encoded = self._launch(self._encode, clip, t5, self.dtype, clip_state, t5_state, *self._put(clip_ids, t5_ids, *self._scales(rows)))
        return self._told(encoded, pictures=False)

    def text_mix(self, row: Row) -> Hashable:
        """What the encoding of a row's prompts depends on besides them."""
        return () if self._lora is None else self._lora.text_mix(row)

    def encoders_out(self, again: bool) -> None:
        """CLIP and T5 make room for the transformer; ``again``: whether there will be more to encode."""
        for name in ("clip", "t5"):
            self.networks[name].leave(again)

    @contextlib.contextmanager
    def compiling(self, rows: Sequence[Row], batch: int, texts: tuple[int, int]) -> Iterator[None]:
        """Within it threads compile, in the rows' order, all programs that their batches take, while weights are
        on their way. ``texts``: tokens of CLIP's prompts and of T5's.

        What a program is called with later must be what it is compiled for here, or it is compiled once more.
        """
        sizes = dict.fromkeys((row.height, row.width) for row in rows)
        whole = not isinstance(self.networks["flux"], StreamedFlux)
        jobs: dict[Hashable, Callable[[], Iterator[Any]]] = {"encode": lambda: self._lower_encode(batch, texts)}
        for size in sizes:
            jobs |= {("denoise", *size): functools.partial(self._lower_denoise, batch, texts[1], *size)} if whole else {}
            jobs |= {("decode", *size): functools.partial(self._lower_decode, batch, *size)}
        # Python traces one program at a time however many threads it has, so the one that is needed first goes first.
        with ThreadPoolExecutor(2, "compile") as compiler, ThreadPoolExecutor(1, "trace") as tracer:
            each = lambda lower: [compiler.submit(lowered.compile) for _, lowered in lower()]  # noqa: E731
            self._compiled = {key: tracer.submit(each, lower) for key, lower in jobs.items()}
            try:
                yield
            finally:
                for pool in (tracer, compiler):
                    pool.shutdown(cancel_futures=True)
                self._compiled = {}

    def programs(
        self, batch: int, texts: tuple[int, int], height: int, width: int, parts: Sequence[str]
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:  # fmt: skip
        """Names and programs that pictures of one size take for these ``parts`` of the way (encode, denoise, decode), from
        shapes alone: each is lowered when its turn comes, and is yet to be compiled."""
        lower = {"encode": lambda: self._lower_encode(batch, texts), "denoise": lambda: self._lower_denoise(batch, texts[1], height, width),
                 "decode": lambda: self._lower_decode(batch, height, width)}  # fmt: skip
        for part in parts:
            yield from lower[part]()

    def _lower_encode(self, batch: int, texts: tuple[int, int]) -> Iterator[tuple[str, jax.stages.Lowered]]:
        (clip, clip_state), (t5, t5_state) = (self.networks[name].abstract() for name in ("clip", "t5"))
        ids = [self._shape(np.int32, batch, length) for length in texts]
        yield "encode", self._run(self._encode.lower, clip, t5, self.dtype, clip_state, t5_state, *ids, *self._abstract_scales(batch))

    def _lower_denoise(self, batch: int, length: int, height: int, width: int) -> Iterator[tuple[str, jax.stages.Lowered]]:
        cfg, (flux, state) = self.flux_config, self.networks["flux"].abstract()
        latents = self._latents(batch, height, width)
        tokens = latents.shape[1]
        text = self._shape(self.dtype, batch, length, cfg.joint_attention_dim)
        pooled = self._shape(self.dtype, batch, cfg.pooled_projection_dim)
        sigmas, left, guidance = self._shape(np.float32, batch, sampling.STEPS + 1), self._shape(np.int32, batch), self._shape(np.float32, batch)
        rope = 2 * (jax.ShapeDtypeStruct((length + tokens, sum(cfg.axes_dims_rope) // 2), np.float32, sharding=replicated(self.mesh)),)
        turns, scales = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(self.mesh)), self._abstract_scales(batch)
        modulate = self._run(self._modulate.lower, flux, self.dtype, state, pooled, sigmas, guidance, *scales)
        yield "modulate", modulate
        mod = jax.tree.map(lambda x: self._shape(x.dtype, *x.shape), modulate.out_info)
        yield "denoise", self._run(self._denoise.lower, flux, self.dtype, state, latents, text, mod, sigmas, left, turns, rope, *scales)

    def _lower_decode(self, batch: int, height: int, width: int) -> Iterator[tuple[str, jax.stages.Lowered]]:
        graph, state = self.networks["vae"].abstract()
        scale = self.vae_config.scale
        yield "decode", self._run(self._decode.lower, graph, self.dtype, state, self._latents(batch, height, width), height // scale, width // scale)

    def _latents(self, batch: int, height: int, width: int) -> jax.ShapeDtypeStruct:
        return self._shape(np.float32, batch, (height // self.multiple) * (width // self.multiple), self.flux_config.in_channels)

    def _shape(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def _abstract_scales(self, batch: int) -> list[jax.ShapeDtypeStruct]:
        return [] if self._lora is None else [self._shape(np.float32, batch, len(self._lora.adapters))]

    def _ready(self, *names: str, program: Hashable = None) -> list[tuple[Any, Any]]:
        """Graph definitions and parameters, loaded if they were not, and ``program`` compiled if it is about to be."""
        networks = [self.networks[name] for name in names]
        missing = sum(network.missing for network in networks)
        if not all(network.here for network in networks):
            jax.block_until_ready(self._pictures)  # what comes now may need the memory that they are drawn in
        with self.watcher.loading(missing) if missing else contextlib.nullcontext(lambda count: None) as progress:
            for network in networks:
                network.load(progress)
        if compiled := self._compiled.pop(program, None):
            with self.watcher.compiling():
                for program in compiled.result():
                    program.result()
        return [network.parts() for network in networks]

    def denoise(self, rows: Sequence[Row], text: np.ndarray, pooled: np.ndarray) -> jax.Array:
        """Latents ``[B, L, 4C]`` float32 of rows of one size, from their own seeds."""
        height, width = (side // self.vae_config.scale for side in (rows[0].height, rows[0].width))
        tokens = (height // 2) * (width // 2)
        noise = {row.seed: None for row in rows}
        for seed in noise:
            noise[seed] = sampling.noise(seed, self.flux_config.in_channels // 4, height, width)
        latents = np.stack([noise[row.seed] for row in rows])
        sigmas, counts = sampling.padded_sigmas([self.schedule.sigmas(row.num_inference_steps, tokens) for row in rows])
        guidance = np.array([row.guidance_scale for row in rows], np.float32)
        rope = rope_table(text.shape[1], height // 2, width // 2, self.flux_config.axes_dims_rope)
        rope = tuple(put(table, replicated(self.mesh)) for table in rope)
        (graph, state), _ = self._ready("flux", "vae", program=("denoise", rows[0].height, rows[0].width))  # the VAE on the same bar
        if isinstance(self.networks["flux"], StreamedFlux):
            return self._told(self._denoise_streamed(self.networks["flux"], latents, text, pooled, sigmas, counts, guidance, rope))
        latents, text, pooled, guidance, *scales = self._put(latents, text, pooled, guidance, *self._scales(rows))
        for first in range(0, counts.max(), sampling.STEPS):
            levels, left = self._put(sigmas[:, first : first + sampling.STEPS + 1], counts - first)
            turns = put(np.array(min(counts.max() - first, sampling.STEPS), np.int32), replicated(self.mesh))
            mod = self._launch(self._modulate, graph, self.dtype, state, pooled, levels, guidance, *scales)
            latents = self._launch(self._denoise, graph, self.dtype, state, latents, text, mod, levels, left, turns, rope, *scales)
        return self._told(latents)  # by now: decoding may have to wait for its program

    def _denoise_streamed(self, flux: StreamedFlux, latents, text, pooled, sigmas, counts, guidance, rope) -> jax.Array:
        """What ``denoise`` computes, with the transformer's blocks passing through the devices."""
        graph, state = flux.parts()
        latents, text, pooled, guidance, sigmas, left = self._put(latents, text, pooled, guidance, sigmas, counts)
        vec, final = self._launch(self._condition, graph, self.dtype, state, pooled, sigmas, guidance)
        with flux.modulators(self.watcher.streaming) as layers:
            mods = {name: jax.block_until_ready(self._told(self._launch(self._layer, *layer, vec))) for name, layer in layers}
        steps = counts.max()
        with flux.blocks(steps, self.watcher.streaming) as blocks:
            for i in range(steps):
                x = self._told(self._launch(self._embed, graph, self.dtype, state, latents, text))
                for name, (block_graph, block) in itertools.islice(blocks, len(flux)):
                    mod = [mods[layer] for layer in flux.modulators_of(name)]
                    x = self._launch(self._block, block_graph, graph, block, state, x, mod, i, rope)
                    jax.block_until_ready(self._told(x))  # or blocks would pile up behind the computation
                latents = self._launch(self._step, graph, state, latents, x, final, i, sigmas, left)
        return latents

    def decode(self, latents: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Latents → pixels ``[B, height, width, 3]`` uint8, and whether each image is finite ``[B]``."""
        scale = self.vae_config.scale
        ((graph, state),) = self._ready("vae", program=("decode", height, width))
        self._pictures = self._told(self._launch(self._decode, graph, self.dtype, state, latents, height // scale, width // scale))
        return self._pictures

    def _scales(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Each row's mix of adapters, if it has one of its own."""
        return [] if self._lora is None else [self._lora.scales(rows)]

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [put(array, batch_sharding(self.mesh)) for array in arrays]

    def _run(self, program: Any, *args: Any) -> Any:
        # float32 means float32: TPUs and GPUs would multiply in bfloat16 or TF32.
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            return program(*args)

    def _launch(self, program: Any, *args: Any) -> Any:
        """Runs a program of the devices."""
        outputs = self._run(program, *args)
        self._since = self._since or time.monotonic()
        return outputs

    def _told(self, outputs: Any, pictures: bool = True) -> Any:
        """The outputs of the last of some programs, told to whoever watches."""
        assert self._since is not None
        self.watcher.launched(self._since, outputs, pictures)
        self._since = None
        return outputs
