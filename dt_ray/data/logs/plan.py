"""Plans which episodes continue from file to file, and the ids of all episodes of a dataset.

An episode is identified by its file and its id. It continues in another file only where the log itself says so, by the
first of these that it has: both are parts of one file; the setting `data.episodes_across_files`; the id is that of a
folder (`episode=3/`); timesteps that continue; a logged next observation with which the other file begins; a column of
starts that does not mark the first row; ids that count on through all files; ids that are unique everywhere (UUIDs).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from dt_ray.data.logs.files import DatasetFile
from dt_ray.data.logs.numbering import numbers_in_file
from dt_ray.errors import DataError

UUID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

log = logging.getLogger("dt_ray")


class FileEpisodes(NamedTuple):
    """The episodes of one file, in the order in which they are cut from it.

    `opens` and `closes` are the episodes of its first and last row. `before` and `after` are hashes of the observation
    with which an episode begins here, and of the logged one after its last row; 0 where it isn't logged.
    """

    labels: Sequence[int | str]
    are_logged: bool  # the labels; else they are counted
    are_shared: bool  # the labels are the name of a folder, and so the same in all files below it
    ended: Bool[ndarray, "E"]
    num_steps: Int[ndarray, "E"]
    first: Float[ndarray, "E"]  # timestep; NaN where none is logged
    last: Float[ndarray, "E"]
    before: Int[ndarray, "E"]
    after: Int[ndarray, "E"]
    opens: int
    closes: int
    opens_marked: bool | None  # as a start; None: no column marks any
    doubt: str | None  # what looks wrong


class FilePlan(NamedTuple):
    """What reading one file needs to know of the other files."""

    ids: Int[ndarray, "E"]
    joins: bool  # some episode of the dataset lies in several files
    labels: dict[int, str]  # the logged ids of these, for messages


class _Piece(NamedTuple):
    """The steps of an episode in one file."""

    file: int
    episode: int  # among the file's


def plan_files(
    files: Sequence[DatasetFile], looks: Sequence[FileEpisodes], across: bool | Literal["auto"]
) -> list[FilePlan]:
    """The ids of each file's episodes: the logged ones, unless two episodes share one.

    Raises:
        DataError: timesteps leave it open whether an episode goes on, or contradict its end.
    """
    episodes = _chains(files, looks, across)
    joins = any(len(pieces) > 1 for pieces in episodes)
    numbers = _number(files, looks, episodes)
    ids = [np.zeros(len(look.labels), np.int64) for look in looks]
    labels: dict[int, str] = {}
    for number, pieces in zip(numbers, episodes, strict=True):
        for piece in pieces:
            ids[piece.file][piece.episode] = number
        if len(pieces) > 1:
            labels[number] = f"{looks[pieces[0].file].labels[pieces[0].episode]}"
    return [FilePlan(each, joins, labels) for each in ids]


def _number(files: Sequence[DatasetFile], looks: Sequence[FileEpisodes], episodes: Sequence[list[_Piece]]) -> list[int]:
    """An id for each episode: the logged one where these are unique, else one by file and id."""
    first = [pieces[0] for pieces in episodes]
    labels = [looks[piece.file].labels[piece.episode] for piece in first]
    sources = [files[piece.file].source for piece in first]
    if not any(look.are_logged for look in looks):
        order = sorted(range(len(first)), key=lambda i: first[i])
        numbers = [0] * len(first)
        for number, index in enumerate(order):
            numbers[index] = number
        return numbers
    unique = len(set(zip(sources, labels, strict=True))) == len(labels)
    if unique and all(isinstance(label, int) for label in labels) and all(look.are_logged for look in looks):
        return [int(label) for label in labels]
    if unique and all(isinstance(label, str) for label in labels):
        ranks = {label: rank for rank, label in enumerate(sorted(set(labels)))}  # type: ignore[type-var]
        return [ranks[label] for label in labels]  # type: ignore[index]
    own = [numbers_in_file(look.labels, files[at].index) for at, look in enumerate(looks)]
    return [int(own[piece.file][piece.episode]) for piece in first]


def _chains(
    files: Sequence[DatasetFile], looks: Sequence[FileEpisodes], across: bool | Literal["auto"]
) -> list[list[_Piece]]:
    """The pieces of each episode, in the order of its steps."""
    pieces: dict[tuple[int | None, int | str, int], list[_Piece]] = {}
    for at, look in enumerate(looks):
        for index, label in enumerate(look.labels):
            key = (files[at].source, label, 0) if look.are_logged else (None, at, index)
            pieces.setdefault(key, []).append(_Piece(at, index))
    global_ids = _are_global(files, looks) if across == "auto" else {}
    chains: list[list[_Piece]] = []
    unsure: list[tuple[_Piece, _Piece]] = []
    for key, parts in pieces.items():
        if len(parts) == 1:
            chains.append(parts)
        else:
            chains += _chain(parts, files, looks, across, key[0] is not None and global_ids.get(key[0], False), unsure)
    if unsure:
        before, piece = unsure[0]
        log.warning(
            "%d episode id(s) are in several files, the first, %s, in %s and in %s: read as different episodes; if "
            "they are the same, set data.episodes_across_files=true",
            *(len(unsure), looks[before.file].labels[before.episode], files[before.file].path, files[piece.file].path),
        )
    if all(look.are_logged for look in looks):
        return chains
    return _chain_unnumbered(chains, files, looks, across)


def _chain(
    pieces: list[_Piece],
    files: Sequence[DatasetFile],
    looks: Sequence[FileEpisodes],
    across: bool | Literal["auto"],
    is_global: bool,
    unsure: list[tuple[_Piece, _Piece]],
) -> list[list[_Piece]]:
    """Joins the pieces with one id, in several files or several times in one file, into episodes.

    Pairs of which nothing says whether they are one episode are taken for two, and added to `unsure`.
    """
    if across is True or (looks[pieces[0].file].are_shared and across == "auto"):
        return _split_at_ends(pieces, looks)
    first, last, num = (np.array([getattr(looks[p.file], name)[p.episode] for p in pieces]) for name in
                        ("first", "last", "num_steps"))  # fmt: skip
    counted = bool((last - first + 1 == num).all())  # False where no timestep is logged too
    if across == "auto" and (counted or num.sum() == last.max() - first.min() + 1):
        return _chain_by_time(pieces, first, last, num, files, looks)
    chains: list[list[_Piece]] = [[pieces[0]]]
    for before, piece in pairwise(pieces):
        same_file = files[before.file].path == files[piece.file].path
        one, other = looks[before.file], looks[piece.file]
        adjacent = piece.file == before.file + 1 and one.closes == before.episode and other.opens == piece.episode
        known = one.after[before.episode] and other.before[piece.episode]
        if one.ended[before.episode]:
            goes_on = False
        elif same_file:
            goes_on = adjacent and before.file != piece.file
        elif across is False:
            goes_on = False
        elif known:
            goes_on = bool(one.after[before.episode] == other.before[piece.episode])
        elif adjacent and other.opens_marked is not None:
            goes_on = not other.opens_marked
        else:
            label = one.labels[before.episode]
            goes_on = (adjacent and is_global) or (isinstance(label, str) and UUID.fullmatch(label) is not None)
            unsure += [] if goes_on else [(before, piece)]
        if goes_on:
            chains[-1].append(piece)
        else:
            chains.append([piece])
    return chains


def _split_at_ends(pieces: list[_Piece], looks: Sequence[FileEpisodes]) -> list[list[_Piece]]:
    """One episode, or, where no timestep orders the pieces, one after each end."""
    times = [looks[piece.file].first[piece.episode] for piece in pieces]
    if not np.isnan(times).any():
        return [pieces]  # in the order of their timesteps, which joining checks
    chains: list[list[_Piece]] = [[]]
    for piece in pieces:
        chains[-1].append(piece)
        if looks[piece.file].ended[piece.episode]:
            chains.append([])
    return [chain for chain in chains if chain]


def _chain_by_time(
    pieces: list[_Piece],
    first: ndarray,
    last: ndarray,
    num: ndarray,
    files: Sequence[DatasetFile],
    looks: Sequence[FileEpisodes],
) -> list[list[_Piece]]:
    """Joins pieces whose timesteps continue one another."""
    order: list[int] = np.argsort(first, kind="stable").tolist()
    if num.sum() == last.max() - first.min() + 1 and not (first == first[0]).all():
        return [[pieces[at] for at in order]]
    chains: list[list[int]] = []
    for at in order:
        open_ones = [chain for chain in chains if last[chain[-1]] + 1 == first[at]]
        running = [c for c in open_ones if not looks[pieces[c[-1]].file].ended[pieces[c[-1]].episode]]
        if first[at] == first.min():
            chains.append([at])
        elif len(running) == 1:
            running[0].append(at)
        else:
            piece, before = pieces[at], pieces[order[order.index(at) - 1]]
            label = looks[piece.file].labels[piece.episode]
            if not running and before.file == piece.file:
                chains.append([at])
                continue
            raise DataError(
                f"episode {label}: in {files[before.file].path} timestep {last[pieces.index(before)]:g} is followed by "
                f"{first[at]:g} in {files[piece.file].path}; a step is missing or twice there; if each file has "
                f"episodes of its own, set data.episodes_across_files=false"
            )
    return [[pieces[at] for at in chain] for chain in sorted(chains, key=lambda c: pieces[c[0]])]


def _chain_unnumbered(
    chains: list[list[_Piece]],
    files: Sequence[DatasetFile],
    looks: Sequence[FileEpisodes],
    across: bool | Literal["auto"],
) -> list[list[_Piece]]:
    """Joins episodes without ids: the last one of a file may continue as the first one of the next file."""
    result: list[list[_Piece]] = []
    unsure = None
    for chain in sorted(chains, key=lambda chain: chain[0]):
        piece = chain[0]
        before = result[-1][-1] if result else None
        if before is None or looks[piece.file].are_logged or piece.file != before.file + 1:
            result.append(chain)
            continue
        one, other = looks[before.file], looks[piece.file]
        goes_on = not (
            one.are_logged or one.ended[before.episode] or files[before.file].source != files[piece.file].source
        )
        if goes_on and files[before.file].path != files[piece.file].path and across is not True:
            known = one.after[before.episode] and other.before[piece.episode]
            if across is False:
                goes_on = False
            elif known:
                goes_on = bool(one.after[before.episode] == other.before[piece.episode])
            elif not np.isnan(one.last[before.episode]) and not np.isnan(other.first[piece.episode]):
                goes_on = bool(other.first[piece.episode] == one.last[before.episode] + 1)
            elif other.opens_marked is not None:
                goes_on = not other.opens_marked
            else:
                goes_on, unsure = False, before
        if goes_on:
            result[-1] += chain
        else:
            result.append(chain)
    if unsure is not None:
        log.warning(
            "the last episode of %s has no end: read as cut there; if it goes on in the next file, set "
            "data.episodes_across_files=true",
            files[unsure.file].path,
        )
    return result


def _are_global(files: Sequence[DatasetFile], looks: Sequence[FileEpisodes]) -> dict[int, bool]:
    """For each dataset, whether its ids count on through its files: each id is in one run of rows over all files.

    False where a file begins with the same id as the first file: it may count anew.
    """
    result: dict[int, bool] = {}
    for source in {file.source for file in files}:
        own = [look for file, look in zip(files, looks, strict=True) if file.source == source]
        seen: set[int | str] = set()
        fine = True
        for at, look in enumerate(own):
            labels = set(look.labels)
            again = labels & seen
            before = None if at == 0 else own[at - 1].labels[own[at - 1].closes]
            opening = look.labels[look.opens]
            fine &= not again or (again == {before} and opening == before and opening != own[0].labels[own[0].opens])
            fine &= len(labels) == len(look.labels)
            seen |= labels
        result[source] = fine
    return result
