"""What the person at the terminal sees: bars while it runs, a summary when it ends."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring
from tqdm import tqdm

from fluxbatch.generation.observer import ProgressObserver
from fluxbatch.generation.prompts import PromptEmbeds
from fluxbatch.shards import progress
from fluxbatch.shards.progress import Lines


class Devices:
    """The time from the launch of the first batch to the end of the last, and how much of it the devices were busy:
    had a program running or queued, from the return of the call that launched it until its outputs were there."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "devices")
        self._first: float | None = None
        self._last = self._busy = self._busy_before = self._drawing = self._until = 0.0

    def launched(self, since: float, outputs: Any, pictures: bool) -> None:
        """In the order in which the devices are given programs."""
        self._pool.submit(self._watch, since, outputs, pictures)

    def _watch(self, since: float, outputs: Any, pictures: bool) -> None:
        jax.block_until_ready(outputs)
        now = time.monotonic()
        if pictures and self._first is None:
            self._first = self._until = since
        if self._first is not None:  # what comes before the first batch is not its time
            took = max(0.0, now - max(since, self._until))
            self._busy, self._until = self._busy + took, now
        if pictures:
            self._last, self._busy_before, self._drawing = now, self._busy, self._drawing + took

    def drawing(self) -> Future[float]:
        """The busy seconds that drawing what was launched since the last call takes."""

        def taken() -> float:
            seconds, self._drawing = self._drawing, 0.0
            return seconds

        return self._pool.submit(taken)

    def figures(self) -> tuple[float, float]:
        """Seconds from the first batch to the last, and the busy ones among them. Waits for what was launched."""
        self._pool.submit(lambda: None).result()
        return (self._last - self._first, self._busy_before) if self._first is not None else (0.0, 0.0)


class Report(ProgressObserver):
    """Bars (or lines) on standard error, seconds by stage, and the closing lines on standard output."""

    def __init__(self, quiet: bool = False) -> None:
        """``quiet``: for all but one process of a replica."""
        self.quiet = quiet
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.texts: Counter[str] = Counter()  # first encoded, or first from the cache; and encoded once more
        self._texts: set[int] = set()  # hashes of these
        self.loaded = 0  # bytes of weights that this process has read
        self.devices = Devices()
        self.images = 0  # handed to the devices, padding not counted
        self.flops = 0.0  # that these take
        self.peak: float | None = None  # FLOP/s of all devices together, where it is known
        self._streamed = 0.0  # seconds of reading that went on beside the stages
        self._within = 0.0  # seconds of stages inside the current one
        self._bars: list[tqdm[Any] | Lines] = []
        self._thread = threading.get_ident()
        self._watch_compiler()

    def _watch_compiler(self) -> None:
        def seen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == self._thread:
                self._account("compile", duration_secs)

        jax.monitoring.register_event_duration_secs_listener(seen)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``; a stage within, or compiling, is counted there alone."""
        start, outer, self._within = time.monotonic(), self._within, 0.0
        try:
            yield
        finally:
            own = time.monotonic() - start - self._within
            self._within += outer
            self._account(name, own)

    def _account(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._within += seconds

    @contextlib.contextmanager
    def bar(self, total: int | None, what: str, unit: str, unit_scale: bool = False) -> Iterator[tqdm[Any] | Lines]:
        with progress.bar(total, what, unit, self.quiet, unit_scale) as bar:
            self._bars.append(bar)
            try:
                yield bar
            finally:
                self._bars.remove(bar)

    @contextlib.contextmanager
    def generating(self, total: int | None, peak: float | None) -> Iterator[None]:
        """The bar of ``total`` images, which ``advance`` moves on. ``peak``: FLOP/s of all devices, where it is
        known."""
        self.peak = peak
        with self.stage("generate"), self.bar(total, "images", "img") as self._images_bar:
            yield

    def advance(self, images: int) -> None:
        """So many more rows are recorded. Called from threads."""
        self._images_bar.update(images)

    @contextlib.contextmanager
    def loading(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over ``total`` bytes of weights, with its GB/s; yields what is told of the bytes read."""

        def read(count: int) -> None:
            self.loaded += count
            bar.update(count)

        with self.stage("load"), self.bar(total, "loading", "B", unit_scale=True) as bar:
            yield read
        for other in self._bars:
            other.unpause()  # what loads meanwhile is not its time

    @contextlib.contextmanager
    def streaming(self) -> Iterator[Callable[[int], None]]:
        """No stage's time, as the devices have work meanwhile; of the figures of the load all the same."""

        def read(count: int) -> None:
            self.loaded += count

        start = time.monotonic()
        yield read
        self._streamed += time.monotonic() - start

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """What threads compile meanwhile is nobody's time; the wait for them is, and the bar says so."""
        bar = self._bars[-1] if self._bars and not self.quiet else None
        what = bar.desc if bar is not None else ""
        with self.stage("compile"):
            if bar is not None:
                bar.set_description_str("compiling")
            yield
        if bar is not None:
            bar.set_description_str(what)

    def launched(self, since: float, outputs: Any, pictures: bool) -> None:
        self.devices.launched(since, outputs, pictures)

    def encoded(self, states: PromptEmbeds) -> None:
        """A shard's texts are there; those of an earlier shard count once."""
        for key in states.states:
            if hash(key) not in self._texts:
                self.texts["encoded" if key in states.encoded else "cached"] += 1
            elif key in states.encoded:
                self.texts["again"] += 1
        self._texts.update(map(hash, states.states))

    def drawing(self, images: int, flops: float) -> Future[float]:
        """A batch is on its way; the devices' seconds for it, without their waits for programs, texts or weights."""
        self.images, self.flops = self.images + images, self.flops + flops
        return self.devices.drawing()

    def speed(self) -> dict[str, float]:
        """From the first batch to the last: images a second, seconds an image, the share of that time in which the
        devices had work; where their peak is known, the share of it that the images took (MFU) and the time as a
        multiple of the one at peak (floor ratio). Empty before the first image."""
        seconds, busy = self.devices.figures()
        if not seconds or not self.images:
            return {}
        said = {
            "images_per_second": self.images / seconds,
            "seconds_per_image": seconds / self.images,
            "device_busy": busy / seconds,
        }
        if self.peak:
            mfu = self.flops / seconds / self.peak
            said |= {"mfu": mfu, "floor_ratio": 1 / mfu}
        return {name: float(f"{value:.4g}") for name, value in said.items()}

    def load(self) -> dict[str, float]:
        """Bytes of weights read so far, the seconds it took and GB/s."""
        seconds = self.seconds.get("load", 0.0) + self._streamed
        rate = self.loaded / seconds / 1e9 if seconds else 0.0
        return {"bytes": self.loaded, "seconds": round(seconds, 2), "gigabytes_per_second": round(rate, 3)}

    def measured(self) -> dict[str, dict[str, float]]:
        """Load and speed for the status; of a run that had nothing to do there is nothing to say."""
        return {"load": self.load(), "speed": self.speed()} if self.images or self.loaded else {}

    def say(self, line: str, aloud: bool = False) -> None:
        """A line on standard error that does not tear the bar; ``aloud``: from any process."""
        if aloud or not self.quiet:
            tqdm.write(f"fluxbatch: {line}", file=sys.stderr)

    def figures(self, counts: Mapping[str, int], own: int | None = None) -> dict[str, object]:
        """What the page says of the run. ``own``: what this replica made, where there are others."""
        speed = self.speed() if own is None else {}
        rate = f"{speed['images_per_second']:,.2f} images/s from the first batch to the last" if speed else None
        return {
            "images": counts["before"] + counts["made"],
            "made now": counts["made"],
            "rejected": counts["rejected"],
            "speed": rate,
            "weights": self._weights(),
            "seconds": round(time.monotonic() - self.started, 2),
        }

    def _weights(self) -> str | None:
        return f"{_size(self.loaded)} at {_size(1e9 * self.load()['gigabytes_per_second'])}/s" if self.loaded else None

    def summary(self, counts: Mapping[str, int], place: str, own: int | None = None, others: str = "by others") -> None:
        """Prints the closing lines. ``counts``: of the whole place. ``own``: what this replica made of it, where there
        are ``others``, who did the rest; speed and seconds are its own."""
        made, speed, total = counts["made"] if own is None else own, self.speed(), time.monotonic() - self.started
        by = f" by this replica, {max(0, counts['made'] - own):,} {others}" if own is not None else ""
        stages = {name: round(value, 2) for name, value in self.seconds.items()} | {"total": round(total, 2)}
        rest = f"{counts['before']:,} done before, {counts['rejected']:,} rejected"
        print(f"rows       {counts['rows']:,}: {made:,} made{by}, {rest}")
        if weights := self._weights():
            print(f"weights    {weights}")
        if self.texts:
            again = f"; {self.texts['again']:,} encoded once more for later shards" if self.texts["again"] else ""
            first = f"{self.texts['encoded']:,} encoded, {self.texts['cached']:,} from the cache"
            print(f"texts      {len(self._texts):,} distinct: {first}{again}")
        print("seconds    " + ", ".join(f"{name} {value:,.1f}" for name, value in stages.items()))
        if speed:
            took = self.images * speed["seconds_per_image"]
            span = f"{self.images:,} images in {took:,.1f} s, from the launch of the first batch to the end of the last"
            rates = f"{speed['images_per_second']:,.2f} images/s, {speed['seconds_per_image']:.3g} s an image"
            print(f"speed      {span}: {rates}; {made / total:,.2f} images/s over the total of {total:,.1f} s")
            peak = ""
            if "mfu" in speed:
                peak = f"; {speed['mfu']:.0%} of their peak, {speed['floor_ratio']:.2f} × the time at it"
            waits = "else they waited for programs, weights, texts or the writing of files"
            print(f"devices    computing {speed['device_busy']:.1%} of these {took:,.1f} s, {waits}{peak}")
        print(f"output     {place}")


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
