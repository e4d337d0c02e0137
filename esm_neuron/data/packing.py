"""Which sequence lies in which row: packs of fixed length, planned from the length histogram.

Planning cost depends on the number of distinct lengths, not of sequences (histogram packing, best fit, longest first:
Krell et al. 2021, "Efficient sequence packing without cross-contamination", arXiv:2107.02027). The plan is a function
of the lengths and the generator alone, so every rank makes the same one and a resumed run jumps to its step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from esm_neuron.errors import ConfigError, DataError

_NOBODY = np.empty(0, np.int32)


@dataclass(frozen=True)
class Recipe:
    """Rows of one make-up: `rows` rows of `pack_tokens` slots, each with the same number of sequences of each length."""

    pack_tokens: int
    """Slots of a row."""
    parts: tuple[tuple[int, int], ...]
    """(length in tokens, how many) of the sequences in each row, longest first."""
    rows: int
    """How many rows are made so."""

    @property
    def segments(self) -> int:
        """Sequences in a row."""
        return sum(count for _, count in self.parts)

    @property
    def free(self) -> int:
        """Slots of a row that are still padding."""
        return self.pack_tokens - sum(length * count for length, count in self.parts)


@dataclass(frozen=True)
class PackPlan:
    """Rows of one length and the examples that lie in them, in compressed sparse rows."""

    pack_tokens: int
    """Slots of a row."""
    row_offsets: np.ndarray
    """int64 [rows + 1]: row r holds `members[row_offsets[r]:row_offsets[r + 1]]`."""
    members: np.ndarray
    """int32 (int64 from 2**31 examples on) [examples in this plan]: indices into the example table."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """[segments]: the examples of one row, in their order."""
        return self.members[self.row_offsets[index] : self.row_offsets[index + 1]]

    def efficiency(self, lengths: np.ndarray) -> float:
        """Share of the slots that hold tokens (residues and specials), 0 to 1; 1 for a plan without rows.

        Args:
            lengths: [examples] tokens of every example, specials included.
        """
        slots = self.rows * self.pack_tokens
        return float(lengths[self.members].sum(dtype=np.int64) / slots) if slots else 1.0

    def trimmed_slots(self, lengths: np.ndarray, rows: int) -> int:
        """Slots of all rows in batches of `rows`, each as wide as its longest row; `lengths` as in `efficiency`."""
        filled = (
            np.add.reduceat(lengths[self.members].astype(np.int64), self.row_offsets[:-1]) if self.rows else _NOBODY
        )
        batches = np.pad(filled, (0, -len(filled) % rows)).reshape(-1, rows)
        return int((batches.max(axis=1, initial=0) * (batches > 0).sum(axis=1)).sum())


@dataclass(frozen=True)
class EpochPlan:
    """The optimizer steps of an epoch. All rows of a step have one length, so all ranks run the same program."""

    packs: tuple[PackPlan, ...]
    """One plan a bucket, shortest rows first."""
    packs_per_step: tuple[int, ...]
    """Rows of a step, for each bucket."""
    bucket: np.ndarray
    """int64 [steps]: the bucket of each step."""
    first_row: np.ndarray
    """int64 [steps]: where each step begins in its bucket's plan."""

    def __len__(self) -> int:
        return len(self.bucket)

    def step(self, index: int) -> tuple[int, list[np.ndarray]]:
        """Row length and rows of step `index`, 0 <= index < len(self).

        Returns:
            Slots of a row, and for each row its examples; the filler rows of a bucket's last step have none.
        """
        bucket, first = int(self.bucket[index]), int(self.first_row[index])
        pack, rows = self.packs[bucket], self.packs_per_step[bucket]
        held = [pack.row(r) for r in range(first, min(first + rows, pack.rows))]
        return pack.pack_tokens, held + [_NOBODY] * (rows - len(held))

    def first_steps(self, limit: int | None = None) -> list[int]:
        """The first step of each bucket that has one, ascending; of the first `limit` steps only, if given."""
        _, first = np.unique(self.bucket[:limit], return_index=True)
        return sorted(first.tolist())

    def efficiency(self, lengths: np.ndarray, batches: int | None = None) -> float:
        """Share of the slots that are computed which hold tokens.

        Args:
            lengths: as in `PackPlan.efficiency`.
            batches: batches that a step is laid out in, over all passes and ranks, where each leaves out its filler
                rows and the columns that are padding in all its rows; None: all rows are whole, filler rows too.
        """
        tokens = sum(int(lengths[pack.members].sum(dtype=np.int64)) for pack in self.packs)
        if batches is None:
            step_slots = np.array([p.pack_tokens * r for p, r in zip(self.packs, self.packs_per_step, strict=True)])
            return tokens / int(step_slots[self.bucket].sum())
        pairs = zip(self.packs, self.packs_per_step, strict=True)
        return tokens / sum(pack.trimmed_slots(lengths, rows // batches) for pack, rows in pairs)


def pack_histogram(counts: np.ndarray, row_lengths: Sequence[int], max_segments: int) -> list[Recipe]:
    """Best-fit packing of a length histogram, longest sequences first.

    A sequence goes into the open row with the least room that holds it; where there is none it opens a row of the
    shortest length that holds it. So short sequences first fill the gaps in long rows, and the rest make short rows.

    Args:
        counts: [longest + 1] number of sequences of each length in tokens; the longest fits the longest row.
        row_lengths: the lengths a row may have, in tokens.
        max_segments: most sequences in a row.

    Returns:
        Recipes that together use every sequence once.
    """
    row_lengths = sorted(row_lengths)
    gaps: list[int] = []
    shelf: dict[int, list[Recipe]] = {}
    full: list[Recipe] = []

    def store(recipe: Recipe) -> None:
        if recipe.segments == max_segments or recipe.free == 0:
            full.append(recipe)
        else:
            if recipe.free not in shelf:
                insort(gaps, recipe.free)
            shelf.setdefault(recipe.free, []).append(recipe)

    def take(length: int, needed: int) -> Recipe:
        tightest = bisect_left(gaps, length)
        if tightest == len(gaps):
            return Recipe(row_lengths[bisect_left(row_lengths, length)], (), needed)
        gap = gaps[tightest]
        recipe = shelf[gap].pop()
        if not shelf[gap]:
            del shelf[gap], gaps[tightest]
        return recipe

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            recipe = take(length, left)
            each = min(recipe.free // length, max_segments - recipe.segments, left)
            rows = min(recipe.rows, left // each)
            if recipe.parts and rows < recipe.rows:
                store(replace(recipe, rows=recipe.rows - rows))
            store(replace(recipe, parts=(*recipe.parts, (length, each)), rows=rows))
            left -= each * rows
    return full + [recipe for gap in gaps for recipe in shelf[gap]]


def plan_buckets(
    lengths: np.ndarray, row_lengths: Sequence[int], max_segments: int, rng: np.random.Generator
) -> tuple[PackPlan, ...]:
    """Rows of several lengths that together hold every example once, in random company and order.

    Args:
        lengths: integers [examples]: tokens of each example, specials included.
        row_lengths: the buckets: slots of a row.
        max_segments: most sequences in a row; 1 gives one sequence a row.
        rng: decides which examples of a length take which place, and the order within a row and of the rows.

    Returns:
        One plan for each row length, shortest first; a bucket that nothing needs has no rows.

    Raises:
        DataError: there is no example, or one is empty or longer than the longest row.
    """
    longest_row = max(row_lengths)
    _check_lengths(lengths, longest_row)
    counts = np.bincount(lengths)
    recipes = pack_histogram(counts, row_lengths, max_segments)
    order = _shuffled_by_length(lengths, counts, rng)
    next_of = np.cumsum(counts) - counts

    def draw(length: int, number: int) -> np.ndarray:
        start = next_of[length]
        next_of[length] += number
        return order[start : start + number]

    return tuple(
        _fill([recipe for recipe in recipes if recipe.pack_tokens == pack_tokens], pack_tokens, draw, rng, order.dtype)
        for pack_tokens in sorted(set(row_lengths))
    )


def plan_epoch(
    lengths: np.ndarray, row_lengths: Sequence[int], max_segments: int, packs_per_step: int, rng: np.random.Generator
) -> EpochPlan:
    """The steps of one epoch over all examples; their number depends on the length histogram alone, not on `rng`.

    Args:
        lengths, row_lengths, max_segments, rng: as in `plan_buckets`; `rng` also decides which bucket comes when.
        packs_per_step: rows of a step of the longest bucket; see `bucket_rows` for the others.

    Raises:
        DataError: as in `plan_buckets`.
    """
    packs = plan_buckets(lengths, row_lengths, max_segments, rng)
    rows = tuple(bucket_rows(packs_per_step, pack.pack_tokens, max(row_lengths)) for pack in packs)
    steps = [-(-pack.rows // count) for pack, count in zip(packs, rows, strict=True)]
    bucket = rng.permutation(np.repeat(np.arange(len(packs)), steps))
    first_row = np.empty(len(bucket), np.int64)
    for number, (count, total) in enumerate(zip(rows, steps, strict=True)):
        first_row[bucket == number] = np.arange(total) * count
    return EpochPlan(packs, rows, bucket, first_row)


def bucket_rows(rows: int, pack_tokens: int, longest_row: int) -> int:
    """Rows of a shorter bucket that make about as many slots as `rows` rows of the longest: rows * (longest // own).

    So a step costs about the same, and weighs about as many residues, whatever its bucket.
    """
    return rows * (longest_row // pack_tokens)


def attention_cost(hidden_size: int) -> Callable[[int], float]:
    """Predicted cost of a row of L slots under masked attention, in multiply-adds of one block's forward pass.

    The linear layers take 12 h^2 a token (query, key, value and output h^2 each, the feed-forward 8 h^2), scores and
    their use L h a token each: L * 12 h^2 + L^2 * 2 h. With attention over segments only, the second term does not
    depend on the row length, and one bucket is as good as several.
    """
    return lambda pack_tokens: 12.0 * hidden_size**2 * pack_tokens + 2.0 * hidden_size * pack_tokens**2


def bucket_candidates(pack_tokens: int, multiple: int = 64, parts: int = 8) -> tuple[int, ...]:
    """Row lengths worth trying, ascending: `pack_tokens`, and its halves, thirds ... eighths rounded down to `multiple`.

    Such lengths fill a step of `pack_tokens` slots a row almost exactly (`bucket_rows`).
    """
    shorter = {pack_tokens // part // multiple * multiple for part in range(2, parts + 1)}
    return tuple(sorted((shorter - {0}) | {pack_tokens}))


def choose_buckets(
    lengths: np.ndarray,
    candidates: Sequence[int],
    max_buckets: int,
    max_segments: int,
    cost: Callable[[int], float],
    packs_per_step: int = 1,
) -> tuple[int, ...]:
    """The row lengths with the least predicted cost, from the length histogram.

    Every choice of at most `max_buckets` candidates is packed (on the histogram, so in milliseconds) and costs

        sum over its buckets of  steps * rows of a step * cost(row length),

    filler rows included, so that a small data set does not get more buckets than it can fill. The longest candidate is
    always among them: whatever is legal fits, and a bucket without rows costs nothing. Among equals fewer buckets win.

    Args:
        lengths: integers [examples]: tokens of each example, specials included.
        candidates: row lengths to choose from, at most a dozen (choices are tried exhaustively).
        max_buckets: most row lengths to use, at least 1.
        max_segments: most sequences in a row.
        cost: predicted cost of one row of a length, such as `attention_cost(hidden_size)`.
        packs_per_step: rows of a step of the longest bucket.

    Returns:
        Row lengths, ascending.

    Raises:
        ConfigError: `max_buckets` is below 1.
        DataError: as in `plan_buckets`.
    """
    if max_buckets < 1:
        raise ConfigError(f"data.max_buckets={max_buckets} is below 1; use data.max_buckets=1 for one row length")
    longest = max(candidates)
    _check_lengths(lengths, longest)
    counts = np.bincount(lengths)

    def total(choice: tuple[int, ...]) -> float:
        rows = dict.fromkeys(choice, 0)
        for recipe in pack_histogram(counts, choice, max_segments):
            rows[recipe.pack_tokens] += recipe.rows
        in_step = {pack_tokens: bucket_rows(packs_per_step, pack_tokens, longest) for pack_tokens in choice}
        return sum(-(-rows[n] // in_step[n]) * in_step[n] * cost(n) for n in choice)

    shorter = sorted(set(candidates) - {longest})
    choices = [(*some, longest) for n in range(min(max_buckets, len(shorter) + 1)) for some in combinations(shorter, n)]
    return min(choices, key=total)


def _check_lengths(lengths: np.ndarray, longest_row: int) -> None:
    if len(lengths) == 0:
        raise DataError("there are 0 examples to pack, at least 1 is needed; check the split and the row filters")
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    if lengths[longest] > longest_row:
        raise DataError(
            f"example {longest} has {lengths[longest]} tokens, a row holds {longest_row}; use data.pack_tokens >= "
            f"{lengths[longest]}, or crop or window it with data.max_residues <= {longest_row - 2}"
        )
    if lengths[shortest] < 1:
        raise DataError(f"example {shortest} has {lengths[shortest]} tokens, at least 1 is needed; remove the record")


def _shuffled_by_length(lengths: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Example indices sorted by length, those of one length in random order."""
    # numpy sorts integers of up to 16 bits by radix, in linear time; few rows are longer than 65,535 tokens.
    keys = lengths.astype(np.min_scalar_type(len(counts)))
    index = np.int32 if len(lengths) < 2**31 else np.int64
    order = np.argsort(keys, kind="stable").astype(index)
    ends = np.cumsum(counts)
    for length in np.flatnonzero(counts):
        rng.shuffle(order[ends[length] - counts[length] : ends[length]])
    return order


def _fill(
    recipes: Sequence[Recipe],
    pack_tokens: int,
    draw: Callable[[int, int], np.ndarray],
    rng: np.random.Generator,
    index: np.dtype,
) -> PackPlan:
    """Give each place of each recipe an example, shuffle within rows, and put the rows in random order."""
    total_rows = sum(recipe.rows for recipe in recipes)
    place = rng.permutation(np.arange(total_rows, dtype=index))
    row_offsets = np.zeros(total_rows + 1, np.int64)
    row_offsets[1:][place] = np.repeat([r.segments for r in recipes], [r.rows for r in recipes])
    np.cumsum(row_offsets, out=row_offsets)
    members = np.empty(row_offsets[-1], index)
    done = 0
    for recipe in recipes:
        drawn = [draw(length, count * recipe.rows).reshape(recipe.rows, count) for length, count in recipe.parts]
        rows = rng.permuted(np.concatenate(drawn, axis=1), axis=1)
        starts = row_offsets[place[done : done + recipe.rows]]
        members[starts[:, None] + np.arange(recipe.segments)] = rows
        done += recipe.rows
    return PackPlan(pack_tokens, row_offsets, members)
