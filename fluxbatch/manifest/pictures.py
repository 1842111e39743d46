"""The pictures that rows read: where they lie, what is in them, and whether they can be read at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fluxbatch.manifest.digests import Digests
from fluxbatch.storage.picture import Missing, Seen, look
from fluxbatch.types import Picture, Reject, Row, UserError

_THREADS = 16
_SHOWN = 50  # missing pictures in one message


def inspect(
    rows: Sequence[Row], rejects: Sequence[Reject], quarantine: bool, digests: Digests | None = None
) -> tuple[list[Row], list[Reject]]:
    """The rows, with digest and size of each picture that they read; as rejects those that cannot have an image.
    ``digests``: those of earlier starts, which gets those of this one.

    UserError names pictures that are not there, unless they are to be set aside (``quarantine``).
    """
    distinct = {p.url: p for row in rows for pictures in row.pictures.values() for p in pictures}
    if not distinct:
        return list(rows), list(rejects)
    found: dict[str, Seen | ValueError] = {**digests.known(distinct)} if digests else {}
    unknown = {url: picture for url, picture in distinct.items() if url not in found}
    with ThreadPoolExecutor(_THREADS, "picture") as pool:
        looked = dict(zip(unknown, pool.map(_inspected, unknown.values()), strict=True))
    if digests:
        digests.saw({url: seen for url, seen in looked.items() if isinstance(seen, Seen)})
    found |= looked
    good, bad, missing = [], list(rejects), []
    for row in rows:
        fault = next(_faults(row, found), None)
        if fault is None:
            good.append(_seen(row, found))
            continue
        field, error = fault
        bad.append(Reject(row.where, f"{field}: {error}", row.id, row.index, row.prompt))
        missing += [bad[-1]] if isinstance(error, Missing) else []
    if missing and not quarantine:
        more = [f"… and {len(missing) - _SHOWN:,} more rows"] if len(missing) > _SHOWN else []
        raise UserError(*(f"{each.where}: {each.reason}" for each in missing[:_SHOWN]), *more)
    return good, bad


def _faults(row: Row, found: Mapping[str, Seen | ValueError]) -> Iterator[tuple[str, ValueError]]:
    for field, pictures in row.pictures.items():
        for picture in pictures:
            if isinstance(fault := found[picture.url], ValueError):
                yield field, fault


def _seen(row: Row, found: Mapping[str, Seen | ValueError]) -> Row:
    """The row with what was found out about its pictures."""

    def seen(picture: Picture | None) -> Picture | None:
        if picture is None:
            return None
        known = found[picture.url]
        assert isinstance(known, Seen)
        return dataclasses.replace(picture, sha256=known.sha256, height=known.height, width=known.width)

    if not row.pictures:
        return row
    images = tuple(each for picture in row.image if (each := seen(picture)))
    return dataclasses.replace(
        row, image=images, mask_image=seen(row.mask_image), control_image=seen(row.control_image)
    )


def _inspected(picture: Picture) -> Seen | ValueError:
    try:
        return look(picture)
    except ValueError as error:
        return error
