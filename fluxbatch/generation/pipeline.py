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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxbatch.distributed.mesh import batch_sharding, put, replicated
from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.generation import programs
from fluxbatch.generation.observer import ProgressObserver
from fluxbatch.generation.steps import STEPS, padded_sigmas
from fluxbatch.lora.apply import Loras
from fluxbatch.models.family import Conditioning, Family, Pictures, Positions, TextInput, inputs_of
from fluxbatch.models.schedulers import Scheduler
from fluxbatch.types import PLAIN, Mode, Row
from fluxbatch.weights.block_streaming import StreamedWeights
from fluxbatch.weights.device_weights import DeviceWeights

PictureArrays = Sequence[Mapping[str, np.ndarray]]  # of each row what ``Family.prepare`` makes
Inputs = tuple[tuple[np.ndarray, ...], ...]  # of each text input its arrays [B, T]


class Pipeline:
    """Runs batches of rows; returns device arrays without waiting for them."""

    def __init__(
        self,
        family: Family,
        networks: Mapping[str, DeviceWeights],
        mesh: jax.sharding.Mesh,
        dtype: Any,
        scheduler: Scheduler,
        observer: ProgressObserver,
        lora: Loras | None = None,
        group: ProcessGroup = ProcessGroup(),
        cache_threshold: float | None = None,
    ):
        """``networks``: one for each component. ``lora``: the adapters that stand beside the weights, mixed row by
        row. ``cache_threshold``: of the step cache, if there is to be one."""
        self.family, self.networks, self.group = family, networks, group
        self.mesh, self.dtype, self.scheduler = mesh, jnp.dtype(dtype), scheduler
        self.observer, self._lora = observer, lora
        self._compiled: dict[Hashable, Future[list[Future[Any]]]] = {}
        self._threshold = cache_threshold
        self.computed: jax.Array | None = None
        """[B] int32, how many steps of the last batch's rows were computed; None where all are, without a cache."""
        self._since: float | None = None  # when the devices got the first program of those under way
        self._pictures: Any = None  # the last ones, perhaps still to be drawn

        platform = mesh.devices.flat[0].platform
        common = {"compiler_options": programs.compiler_options(platform, networks[family.denoiser].dtype.rest)}

        def jit(function: Callable[..., Any], *bound: Any, **options: Any) -> jax.stages.Wrapped:
            function = functools.partial(function, *bound)  # of its own, so that its programs go with this pipeline
            return jax.jit(function, out_shardings=batch_sharding(mesh), **common | options)

        self._encode = jit(programs.encode, family, static_argnames=("graphs", "dtype"))
        self._step_inputs = jit(programs.step_inputs, static_argnames=("graph", "dtype"))
        self._denoise = jit(
            programs.denoise, scheduler.step, static_argnames=("graph", "dtype"), donate_argnames="latents"
        )
        self._fresh_cache = jit(programs.fresh_cache, static_argnames=("graph", "dtype"))
        self._denoise_cached = jit(
            programs.denoise_cached,
            scheduler.step,
            static_argnames=("graph", "dtype"),
            donate_argnames=("latents", "cache"),
        )
        self._step_vector = jit(programs.step_vector, static_argnames=("graph", "dtype"))
        self._step_layer = jit(programs.step_layer, static_argnames="graph")
        self._begin = jit(programs.begin)
        self._embed = jit(programs.embed, static_argnames=("graph", "dtype"))
        self._block = jit(programs.block, static_argnames=("block_graph", "graph"))
        self._step = jit(programs.step, scheduler.step, static_argnames="graph", donate_argnames="latents")
        at_once = programs.pixels_at_once(platform)
        self._encode_pictures = jit(
            functools.partial(programs.encode_pictures, family, at_once=at_once), static_argnames=("graph", "dtype")
        )
        self._decode = jit(
            functools.partial(programs.decode, family, at_once=at_once),
            static_argnames=("graph", "dtype", "height", "width"),
            compiler_options=programs.decoder_options(platform, family.decoder_width),
        )

    def reuse(self, scheduler: Scheduler, observer: ProgressObserver, cache_threshold: float | None) -> None:
        """For another job of a sweep, whose scheduler is of the same class and which has a step cache if this has one:
        noise levels and threshold are data to the programs."""
        self.scheduler, self.observer, self._threshold = scheduler, observer, cache_threshold

    @property
    def _denoiser(self) -> DeviceWeights:
        return self.networks[self.family.denoiser]

    def encode(self, inputs: Inputs, rows: Sequence[Row]) -> Conditioning:
        """Arrays ``[B, T]`` of each text input of rows → their conditioning ``[B, …]``."""
        if not self.networks[self.family.encoders[-1]].here:
            jax.block_until_ready(self._pictures)
            self._denoiser.leave()  # where there is no room for both
        parts = self._ready(*self.family.encoders, program=("encode", *(each[0].shape[1] for each in inputs)))
        encoded = self._launch(self._encode, *self._encoders(parts), *self._put((inputs, *self._scales(rows))))
        return self._told(encoded, pictures=False)

    def _encoders(self, parts: Sequence[tuple[Any, Any]]) -> tuple[Any, Any, dict[str, Any]]:
        """The first arguments of ``programs.encode``."""
        graphs, states = zip(*parts, strict=True)
        return graphs, self.dtype, dict(zip(self.family.encoders, states, strict=True))

    def text_lora_weights(self, row: Row) -> Hashable:
        """What the encoding of a row's prompts depends on besides them."""
        return () if self._lora is None else self._lora.text_weights(row)

    def encoders_out(self, again: bool) -> None:
        """The text encoders make room for the denoiser; ``again``: whether there will be more to encode."""
        for name in self.family.encoders:
            self.networks[name].leave(again)

    @contextlib.contextmanager
    def compiling(self, rows: Sequence[Row], batch: int, inputs: Sequence[TextInput]) -> Iterator[None]:
        """Within it threads compile, in the rows' order, all programs that their batches take, while weights are
        on their way.

        What a program is called with later must be what it is compiled for here, or it is compiled once more.
        """
        sizes = dict.fromkeys((row.height, row.width, row.mode) for row in rows)
        whole = not isinstance(self._denoiser, StreamedWeights)
        jobs: dict[Hashable, Callable[[], Iterator[Any]]] = {}
        for prompt in dict.fromkeys(prompt for *_, mode in sizes for prompt in inputs_of(inputs, mode)):
            jobs["encode", *(each.length for each in prompt)] = functools.partial(self._lower_encode, batch, prompt)
        for size in sizes:
            if size[-1].reads_pictures:
                jobs[self._picture_program(*size)] = functools.partial(self._lower_pictures, batch, *size)
            if whole:
                jobs["denoise", *size] = functools.partial(self._lower_denoise, batch, inputs, *size)
            jobs.setdefault(("decode", *size[:2]), functools.partial(self._lower_decode, batch, *size[:2]))
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
        self, batch: int, inputs: Sequence[TextInput], height: int, width: int, mode: Mode, parts: Sequence[str]
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Names and programs that images of one size and mode take for these ``parts`` of the way (encode, denoise,
        decode), from shapes alone: each is lowered when its turn comes, and is yet to be compiled."""
        lower = {
            "encode": lambda: self._lower_encode(batch, inputs_of(inputs, mode)[0]),
            "denoise": lambda: self._lower_denoise(batch, inputs, height, width, mode),
            "decode": lambda: self._lower_decode(batch, height, width),
        }
        for part in parts:
            yield from lower[part]()

    def _lower_encode(self, batch: int, inputs: Sequence[TextInput]) -> Iterator[tuple[str, jax.stages.Lowered]]:
        parts = [self.networks[name].abstract() for name in self.family.encoders]
        arrays = tuple(tuple(self._shape(np.int32, batch, *shape) for shape in each.shapes()) for each in inputs)
        yield "encode", self._run(self._encode.lower, *self._encoders(parts), arrays, *self._abstract_scales(batch))

    def _lower_pictures(
        self, batch: int, height: int, width: int, mode: Mode
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        graph, state = self.networks[self.family.decoder].abstract()
        arrays = self._picture_shapes(batch, height, width, mode)
        yield "pictures", self._run(self._encode_pictures.lower, graph, self.dtype, state, arrays)

    def _picture_program(self, *size: Any) -> Hashable:
        return "pictures", *self.family.picture_shapes(*size).items()

    def _picture_shapes(self, batch: int, height: int, width: int, mode: Mode) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.family.picture_shapes(height, width, mode)
        return {name: self._shape(np.float32, batch, *shape) for name, shape in shapes.items()}

    def _lower_denoise(
        self, batch: int, inputs: Sequence[TextInput], height: int, width: int, mode: Mode = PLAIN
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        graph, state = self._denoiser.abstract()
        latents = self._latents(batch, height, width)
        prompts = [
            self.family.conditioning(*(self._shape(self.dtype, batch, *shape) for shape in shapes))
            for shapes in map(self.family.conditioning_shapes, inputs_of(inputs, mode))
        ]
        sigmas = self._shape(np.float32, batch, STEPS + 1)
        left, guidance = self._shape(np.int32, batch), self._shape(np.float32, batch)

        def everywhere(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(self.mesh))

        positions = [jax.tree.map(everywhere, self.family.positions(each, height, width, mode)) for each in prompts]
        turns, scales = everywhere(np.array(0, np.int32)), self._abstract_scales(batch)
        made = {}  # of prompts of one length, or of two
        for each in dict.fromkeys(prompts):
            lowered = self._run(self._step_inputs.lower, graph, self.dtype, state, each, sigmas, guidance, *scales)
            yield "step_inputs", lowered
            made[each] = jax.tree.map(lambda x: self._shape(x.dtype, *x.shape), lowered.out_info)
        steps = [made[each] for each in prompts]
        pictures = Pictures()
        if mode.reads_pictures:
            graph_, state_ = self.networks[self.family.decoder].abstract()
            arrays = self._picture_shapes(batch, height, width, mode)
            read = self._run(self._encode_pictures.lower, graph_, self.dtype, state_, arrays).out_info
            pictures = jax.tree.map(lambda x: self._shape(x.dtype, *x.shape), read)
        noise = latents if mode.mask else None
        arguments = [self.family.in_steps(each) for each in prompts], steps, sigmas, left, turns, positions
        if self._threshold is None:
            more = guidance if mode.negative else None, noise, pictures, *scales
            yield "denoise", self._run(self._denoise.lower, graph, self.dtype, state, latents, *arguments, *more)
            return
        fresh = self._run(self._fresh_cache.lower, graph, self.dtype, state, latents)
        yield "fresh_cache", fresh
        cache = jax.tree.map(lambda x: self._shape(x.dtype, *x.shape), fresh.out_info)
        more = everywhere(np.array(0, np.float32)), noise, pictures, *scales
        yield (
            "denoise",
            self._run(self._denoise_cached.lower, graph, self.dtype, state, latents, cache, *_first(arguments), *more),
        )

    def _lower_decode(self, batch: int, height: int, width: int) -> Iterator[tuple[str, jax.stages.Lowered]]:
        graph, state = self.networks[self.family.decoder].abstract()
        yield (
            "decode",
            self._run(self._decode.lower, graph, self.dtype, state, self._latents(batch, height, width), height, width),
        )

    def _latents(self, batch: int, height: int, width: int) -> jax.ShapeDtypeStruct:
        return self._shape(np.float32, batch, *self.family.latent_shape(height, width))

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
        with self.observer.loading(missing) if missing else contextlib.nullcontext(lambda count: None) as progress:
            for network in networks:
                network.load(progress)
        if compiled := self._compiled.pop(program, None):
            with self.observer.compiling():
                for program in compiled.result():
                    program.result()
        return [network.parts() for network in networks]

    def denoise(
        self, rows: Sequence[Row], conditioning: Sequence[Conditioning], pictures: PictureArrays | None = None
    ) -> jax.Array:
        """Latents ``[B, L, C]`` float32 of rows of one size and mode, from their own seeds. ``conditioning``: of their
        prompts, and of their negative ones if they have such; ``pictures``: what the family prepared of each row's."""
        height, width, mode = rows[0].height, rows[0].width, rows[0].mode
        seeds = dict.fromkeys(row.seed for row in rows)
        drawn = {seed: self.family.noise(seed, height, width, mode) for seed in seeds}
        noise = np.stack([drawn[row.seed] for row in rows])
        tokens = self.family.tokens(height, width)
        sigmas, counts = padded_sigmas([self._levels(row, tokens) for row in rows])
        guidance = np.array([row.guidance_scale for row in rows], np.float32)
        cfg_scale = np.array([self.family.cfg_scale(row) for row in rows], np.float32)
        positions = [
            jax.tree.map(lambda x: put(x, replicated(self.mesh)), self.family.positions(each, height, width, mode))
            for each in conditioning
        ]
        read = self._read_pictures(height, width, mode, pictures)
        # the decoder on the same bar
        program = ("denoise", height, width, mode)
        (graph, state), _ = self._ready(self.family.denoiser, self.family.decoder, program=program)
        noise, begin, cfg_scale = self._put((noise, sigmas[:, :2], cfg_scale))
        latents = noise if read.start is None else self._launch(self._begin, noise, read, begin)
        last = cfg_scale if mode.negative else None, noise if mode.mask else None, read
        if isinstance(self._denoiser, StreamedWeights):
            given = self._denoiser, latents, conditioning, sigmas, counts, guidance, positions, last
            return self._told(self._denoise_streamed(*given))
        conditioning, guidance, *scales = self._put((list(conditioning), guidance, *self._scales(rows)))
        cache = None
        if self._threshold is not None:
            cache = self._launch(self._fresh_cache, graph, self.dtype, state, latents)
            threshold = put(np.array(self._threshold, np.float32), replicated(self.mesh))
        for first in range(0, counts.max(), STEPS):
            levels, left = self._put((sigmas[:, first : first + STEPS + 1], counts - first))
            turns = put(np.array(min(counts.max() - first, STEPS), np.int32), replicated(self.mesh))
            inputs = [
                self._launch(self._step_inputs, graph, self.dtype, state, each, levels, guidance, *scales)
                for each in conditioning
            ]
            arguments = [self.family.in_steps(each) for each in conditioning], inputs, levels, left, turns, positions
            if cache is None:
                latents = self._launch(self._denoise, graph, self.dtype, state, latents, *arguments, *last, *scales)
            else:
                given = state, latents, cache, *_first(arguments), threshold, *last[1:]
                latents, cache = self._launch(self._denoise_cached, graph, self.dtype, *given, *scales)
        self.computed = cache and cache.computed
        return self._told(latents)  # by now: decoding may have to wait for its program

    def _read_pictures(self, height: int, width: int, mode: Mode, pictures: PictureArrays | None) -> Pictures:
        """What the denoiser reads of a batch's pictures."""
        if not mode.reads_pictures:
            return Pictures()
        assert pictures is not None
        ((graph, state),) = self._ready(self.family.decoder, program=self._picture_program(height, width, mode))
        arrays = self._put({name: np.stack([each[name] for each in pictures]) for name in pictures[0]})
        return self._told(self._launch(self._encode_pictures, graph, self.dtype, state, arrays))

    def _levels(self, row: Row, tokens: int) -> np.ndarray:
        """``[steps + 1]`` noise levels of a row."""
        if row.sigmas:
            return self.scheduler.shifted(row.sigmas, tokens)[row.first_step :]
        return self.scheduler.sigmas(row.num_inference_steps, tokens)[row.first_step :]

    def _denoise_streamed(
        self, network: StreamedWeights, latents: jax.Array, prompts: Sequence[Conditioning], sigmas: np.ndarray,
        counts: np.ndarray, guidance: np.ndarray, positions: Sequence[Positions], last: tuple[Any, Any, Pictures],
    ) -> jax.Array:  # fmt: skip
        """What ``denoise`` computes, with the transformer's blocks passing through the devices; each serves a row's two
        prompts."""
        graph, state = network.parts()
        conditioning, sigmas, left, guidance = self._put(([*prompts], sigmas, counts, guidance))
        step_vector = functools.partial(self._launch, self._step_vector, graph, self.dtype, state)
        vectors, shared = zip(*(step_vector(each, sigmas, guidance) for each in conditioning), strict=True)
        with network.step_layers(self.observer.streaming) as layers:
            inputs = {
                name: jax.block_until_ready(
                    self._told([self._launch(self._step_layer, *layer, vector) for vector in vectors])
                )
                for name, layer in layers
            }
        passes = network.passes(int(counts.max()), last[-1].references is not None)
        still: list[dict[str, Any]] = [{} for _ in positions]
        with network.blocks(itertools.chain(*passes), self.observer.streaming) as blocks:
            for i, names in enumerate(passes):
                embed = functools.partial(self._launch, self._embed, graph, self.dtype, state, latents)
                x = self._told([embed(*each, last[-1]) for each in zip(conditioning, positions, still, strict=True)])
                for name, (block_graph, block) in itertools.islice(blocks, len(names)):
                    run = functools.partial(self._launch, self._block, block_graph, graph, block, state)
                    own = [[inputs[layer][k] for layer in network.step_layers_of(name)] for k in range(len(x))]
                    given = zip(x, own, shared, positions, strict=True)
                    x = [run(each, mine, common, i, places) for each, mine, common, places in given]
                    jax.block_until_ready(self._told(x))  # or blocks would pile up behind the computation
                    still = [kept | network.still(name, each) for kept, each in zip(still, x, strict=True)]
                latents = self._launch(self._step, graph, state, latents, x, shared, i, sigmas, left, *last)
        return latents

    def decode(self, latents: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Latents → pixels ``[B, height, width, 3]`` uint8, and whether each image is finite ``[B]``."""
        ((graph, state),) = self._ready(self.family.decoder, program=("decode", height, width))
        self._pictures = self._told(self._launch(self._decode, graph, self.dtype, state, latents, height, width))
        return self._pictures

    def _scales(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Each row's LoRA weights, if it has one of its own."""
        return [] if self._lora is None else [self._lora.scales(rows)]

    def _put(self, arrays: Any) -> Any:
        """The pytree of host arrays, dealt over the devices by their first axis."""
        return jax.tree.map(lambda array: put(array, batch_sharding(self.mesh)), arrays)

    def _run(self, program: Callable[..., Any], *args: Any) -> Any:
        # float32 means float32: TPUs and GPUs would multiply in bfloat16 or TF32.
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            return program(*args)

    def _launch(self, program: jax.stages.Wrapped, *args: Any) -> Any:
        """Runs a program of the devices."""
        outputs = self._run(program, *args)
        self._since = self._since or time.monotonic()
        return outputs

    def _told(self, outputs: Any, pictures: bool = True) -> Any:
        """The outputs of the last of some programs, told to whoever watches."""
        assert self._since is not None
        self.observer.launched(self._since, outputs, pictures)
        self._since = None
        return outputs


def _first(arguments: Sequence[Any]) -> Sequence[Any]:
    """Those of ``programs.denoise``, for the one prompt that rows have where there is a step cache."""
    (conditioning, *_), (inputs, *_), *rest, (positions, *_) = arguments
    return conditioning, inputs, *rest, positions
