"""``python -m fluxbatch.keys [WORD …]``: what each key does, and its default.

With words: of the keys that have one of them in name or text. ``--markdown``: all of them, as jobs/docs/keys.md has
them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from fluxbatch.config import reference
from fluxbatch.config.streams import whoever_reads
from fluxbatch.types import Exit


def main(argv: Sequence[str] | None = None) -> NoReturn:
    words = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)]
    code = Exit.OK
    with whoever_reads():
        if {"-h", "--help"} & {*words}:
            print(__doc__)
        elif words == ["--markdown"]:
            print("\n".join(reference.markdown()))
        elif lines := [*reference.page(words)]:
            print("\n".join(lines).rstrip())
        else:
            print(
                f"fluxbatch: error: {' '.join(words)}: expected a word that a key has in its name or its text",
                file=sys.stderr,
            )
            code = Exit.BAD_INPUT
    sys.exit(code)


if __name__ == "__main__":
    main()
