"""What the person at the terminal sees: bars while it runs, a summary when it ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm


class Report:
    """Bars on standard error, seconds by stage, and the closing lines on standard output."""

    def __init__(self, quiet: bool = False) -> None:
        """``quiet``: for all but one process of a replica."""
        self.quiet = quiet
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._compiled = 0.0
        self._watch_compiler()

    def _watch_compiler(self) -> None:
        import jax.monitoring

        def seen(event: str, seconds: float, **_: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self._compiled += seconds

        jax.monitoring.register_event_duration_secs_listener(seen)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``; compiling is counted as its own stage."""
        start, compiled = time.monotonic(), self._compiled
        try:
            yield
        finally:
            compiled = self._compiled - compiled
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start - compiled
            if compiled:
                self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiled

    @contextlib.contextmanager
    def bar(self, total: int, what: str, unit: str, **options: object) -> Iterator[tqdm]:
        with tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=True, smoothing=0.1, disable=self.quiet, **options) as bar:
            yield bar

    def say(self, line: str) -> None:
        """A line on standard error that does not tear the bar."""
        if not self.quiet:
            tqdm.write(f"fluxbatch: {line}", file=sys.stderr)

    def summary(self, counts: Mapping[str, int], place: str) -> dict[str, object]:
        """Prints and returns the closing figures."""
        total = time.monotonic() - self.started
        made = counts["made"]
        generate = self.seconds.get("generate", 0.0)
        rate = made / generate if made and generate > 0 else 0.0
        stages = {name: round(value, 2) for name, value in self.seconds.items()} | {"total": round(total, 2)}
        print(f"rows       {counts['rows']:,}: {made:,} made, {counts['before']:,} done before, {counts['rejected']:,} rejected")
        print("seconds    " + ", ".join(f"{name} {value:,.1f}" for name, value in stages.items()))
        if made:
            print(f"speed      {rate:,.2f} images/s while generating, {made / total:,.2f} over the whole run")
        print(f"output     {place}")
        speed = f"{rate:,.2f} images/s" if made else None
        return {"images": counts["rows"], "made now": made, "rejected": counts["rejected"], "speed": speed, "seconds": stages["total"]}
