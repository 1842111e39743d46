"""What a job of a sweep leaves to the next one. Imports nothing: a command has it before JAX starts."""

from __future__ import annotations

from typing import Any


class KeptPipeline:
    """At most one pipeline, with its weights. ``tag``: which adapters are merged, at which scales."""

    def __init__(self) -> None:
        self.identity: Any = None
        self.pipeline: Any = None
        self.tag: Any = None

    def take(self, identity: Any) -> Any:
        """The pipeline, if it is this one; another one goes, as its memory is needed."""
        pipeline, self.pipeline = self.pipeline, None
        return pipeline if self.identity == identity else None

    def put(self, identity: Any, pipeline: Any, tag: Any) -> None:
        self.identity, self.pipeline, self.tag = identity, pipeline, tag
