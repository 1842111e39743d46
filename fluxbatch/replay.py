"""``python -m fluxbatch.replay id=… output_dir=… run_name=… [save=…]``: makes one row again from its record and
compares the pixels; ``id`` is the row's, or the name of its image. Exit code 0 when they are equal, or equal to
rounding in float32; 3 when they are not.

What decides the picture is as it was recorded; ``pretrained_model_name_or_path=…`` and the other keys that
say where things are, ``hardware`` and ``sharding`` may be given anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING

from fluxbatch.config import application
from fluxbatch.config.schema import Job, shown
from fluxbatch.types import UserError

# Where things are, and how they are computed here: may be another than when the row was made
ANEW = re.compile(
    r"id|save|output_dir|run_name|debug|jax_cache_dir|(hardware|sharding)(\.(?!\w+_dtype)\w+)?"
    r"|model\.(\w+_name_or_path|revision|verify)"
    r"|lora(\.[^.]+\.(path|weight_name))?|lora_config\.(lora_model_name_or_path|weight_name)"
)


@dataclass
class ReplayJob(Job):
    id: str = MISSING  # which row, as metadata.jsonl calls it, or the name of its image
    save: str | None = None  # where the picture that was made goes, as again.png; null: nowhere


def replay(job: ReplayJob) -> int:
    """Makes the image of record ``job.id`` under the run's own configuration."""
    from fluxbatch.session import replay

    return replay.replay(job, job.id, job.save, [key for key in _anew() if key not in ("id", "save")])


def _anew() -> list[str]:
    """The keys given on this command line; UserError for those that would change the picture."""
    words = HydraConfig.get().overrides.task
    keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(list(words))]
    if wrong := [word for word, key in zip(words, keys, strict=True) if not ANEW.fullmatch(key)]:
        raise UserError(
            *(
                f"{shown(word)}: decides the picture, which is replayed as it was recorded; expected where things are "
                "(pretrained_model_name_or_path=…, jax_cache_dir=…), hardware=… or sharding=…"
                for word in wrong
            )
        )
    return keys


def main() -> NoReturn:
    about = "replay: make one row again from its record and compare pixels (output_dir=…, run_name=…, id=…, save=…)."
    application.main(replay, schema=ReplayJob, rows=False, about=about)


if __name__ == "__main__":
    main()
