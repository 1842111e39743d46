"""What the person at the terminal sees: bars while it runs, a summary when it ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from tqdm import tqdm


class Report:
    """Bars on standard error, seconds by stage, and the closing lines on standard output."""

    def __init__(self, quiet: bool = False) -> None:
        """``quiet``: for all but one process of a replica."""
        self.quiet = quiet
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.loaded = 0  # bytes of weights that this process has read
        self._within = 0.0  # seconds of stages inside the current one
        self._bars: list[tqdm] = []
        self._watch_compiler()

    def _watch_compiler(self) -> None:
        import jax.monitoring

        def seen(event: str, seconds: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
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

    def load(self) -> dict[str, float]:
        """Bytes of weights read so far, the seconds it took and GB/s."""
        seconds = self.seconds.get("load", 0.0)
        rate = self.loaded / seconds / 1e9 if seconds else 0.0
        return {"bytes": self.loaded, "seconds": round(seconds, 2), "gigabytes_per_second": round(rate, 3)}

    def say(self, line: str, aloud: bool = False) -> None:
        """A line on standard error that does not tear the bar; ``aloud``: from any process."""
        if aloud or not self.quiet:
            tqdm.write(f"fluxbatch: {line}", file=sys.stderr)

    def summary(self, counts: Mapping[str, int], place: str) -> dict[str, object]:
        """Prints and returns the closing figures."""
        total = time.monotonic() - self.started
        made = counts["made"]
        generate = self.seconds.get("generate", 0.0)
        rate = made / generate if made and generate > 0 else 0.0
        stages = {name: round(value, 2) for name, value in self.seconds.items()} | {"total": round(total, 2)}
        print(f"rows       {counts['rows']:,}: {made:,} made, {counts['before']:,} done before, {counts['rejected']:,} rejected")
        weights = f"{_size(self.loaded)} at {_size(1e9 * self.load()['gigabytes_per_second'])}/s" if self.loaded else None
        if weights:
            print(f"weights    {weights}")
        print("seconds    " + ", ".join(f"{name} {value:,.1f}" for name, value in stages.items()))
        if made:
            print(f"speed      {rate:,.2f} images/s while generating, {made / total:,.2f} over the whole run")
        print(f"output     {place}")
        speed = f"{rate:,.2f} images/s" if made else None
        return {"images": counts["rows"], "made now": made, "rejected": counts["rejected"], "speed": speed,
                "weights": weights, "seconds": stages["total"]}  # fmt: skip


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")
