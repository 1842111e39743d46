"""What the person at the terminal sees: bars while it runs, a summary when it ends."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from fluxbatch.pipeline import Watcher


class Devices:
    """The time from the launch of the first batch to the end of the last, and how much of it the devices were busy:
    had a program running or queued, from the return of the call that launched it until its outputs were there."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "devices")
        self._first: float | None = None
        self._last = self._busy = self._busy_before = self._until = 0.0

    def launched(self, since: float, outputs: Any, pictures: bool) -> None:
        """In the order in which the devices are given programs."""
        self._pool.submit(self._watch, since, outputs, pictures)

    def _watch(self, since: float, outputs: Any, pictures: bool) -> None:
        import jax

        jax.block_until_ready(outputs)
        now = time.monotonic()
        if pictures and self._first is None:
            self._first = self._until = since
        if self._first is not None:  # what comes before the first batch is not its time
            self._busy += max(0.0, now - max(since, self._until))
            self._until = now
        if pictures:
            self._last, self._busy_before = now, self._busy

    def figures(self) -> tuple[float, float]:
        """Seconds from the first batch to the last, and the busy ones among them. Waits for what was launched."""
        self._pool.submit(lambda: None).result()
        return (self._last - self._first, self._busy_before) if self._first is not None else (0.0, 0.0)


class Report(Watcher):
    """Bars on standard error, seconds by stage, and the closing lines on standard output."""

    def __init__(self, quiet: bool = False) -> None:
        """``quiet``: for all but one process of a replica."""
        self.quiet = quiet
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.texts: Counter[str] = Counter()  # prompts that were encoded, and that came from the cache
        self.loaded = 0  # bytes of weights that this process has read
        self.devices = Devices()
        self.images = 0  # handed to the devices, padding not counted
        self.flops = 0.0  # that these take
        self.peak: float | None = None  # FLOP/s of all devices together, where it is known
        self._within = 0.0  # seconds of stages inside the current one
        self._bars: list[tqdm] = []
        self._thread = threading.get_ident()
        self._watch_compiler()

    def _watch_compiler(self) -> None:
        import jax.monitoring

        def seen(event: str, seconds: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == self._thread:
                self._account("compile", seconds)

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
    def bar(self, total: int, what: str, unit: str, **options: object) -> Iterator[tqdm]:
        with tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=True, smoothing=0.1, disable=self.quiet, **options) as bar:
            self._bars.append(bar)
            try:
                yield bar
            finally:
                self._bars.remove(bar)

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

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """What threads compile meanwhile is nobody's time; the wait for them is."""
        return self.stage("compile")

    def launched(self, since: float, outputs: Any, pictures: bool = False) -> None:
        self.devices.launched(since, outputs, pictures)

    def drawing(self, images: int, flops: float) -> None:
        """A batch is on its way."""
        self.images, self.flops = self.images + images, self.flops + flops

    def speed(self) -> dict[str, float]:
        """From the first batch to the last: images a second, seconds an image, the share of that time in which the
        devices had work; where their peak is known, the share of it that the images took (MFU) and the time as a
        multiple of the one at peak (floor ratio). Empty before the first image."""
        seconds, busy = self.devices.figures()
        if not seconds:
            return {}
        said = {"images_per_second": self.images / seconds, "seconds_per_image": seconds / self.images, "device_busy": busy / seconds}
        if self.peak:
            mfu = self.flops / seconds / self.peak
            said |= {"mfu": mfu, "floor_ratio": 1 / mfu}
        return {name: float(f"{value:.4g}") for name, value in said.items()}

    def load(self) -> dict[str, float]:
        """Bytes of weights read so far, the seconds it took and GB/s."""
        seconds = self.seconds.get("load", 0.0)
        rate = self.loaded / seconds / 1e9 if seconds else 0.0
        return {"bytes": self.loaded, "seconds": round(seconds, 2), "gigabytes_per_second": round(rate, 3)}

    def say(self, line: str, aloud: bool = False) -> None:
        """A line on standard error that does not tear the bar; ``aloud``: from any process."""
        if aloud or not self.quiet:
            tqdm.write(f"fluxbatch: {line}", file=sys.stderr)

    def figures(self, counts: Mapping[str, int]) -> dict[str, object]:
        """What the page says of the run."""
        rate = f"{speed['images_per_second']:,.2f} images/s" if (speed := self.speed()) else None
        weights = f"{_size(self.loaded)} at {_size(1e9 * self.load()['gigabytes_per_second'])}/s" if self.loaded else None
        return {"images": counts["rows"], "made now": counts["made"], "rejected": counts["rejected"], "speed": rate,
                "weights": weights, "seconds": round(time.monotonic() - self.started, 2)}  # fmt: skip

    def summary(self, counts: Mapping[str, int], place: str) -> None:
        """Prints the closing lines."""
        figures = self.figures(counts)
        made, speed, total = counts["made"], self.speed(), time.monotonic() - self.started
        stages = {name: round(value, 2) for name, value in self.seconds.items()} | {"total": round(total, 2)}
        print(f"rows       {counts['rows']:,}: {made:,} made, {counts['before']:,} done before, {counts['rejected']:,} rejected")
        if figures["weights"]:
            print(f"weights    {figures['weights']}")
        if self.texts:
            print(f"texts      {self.texts['encoded']:,} encoded, {self.texts['cached']:,} from the cache")
        print("seconds    " + ", ".join(f"{name} {value:,.1f}" for name, value in stages.items()))
        if speed:
            print(f"speed      {figures['speed']}, {speed['seconds_per_image']:.3g} s an image from the first batch to the last; {made / total:,.2f} images/s in all")
            peak = f"; {speed['mfu']:.0%} of their peak, {speed['floor_ratio']:.2f} × the floor" if "mfu" in speed else ""
            print(f"devices    busy {speed['device_busy']:.1%} of that time{peak}")
        print(f"output     {place}")


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
