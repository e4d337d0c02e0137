"""Plan which sequence lies in which pack, all packs of one length, from the length histogram.

Planning cost depends on the number of distinct lengths, not of sequences (histogram packing, best fit, longest first:
Krell et al. 2021, "Efficient sequence packing without cross-contamination", arXiv:2107.02027). The plan is a function
of the lengths and the generator alone, so every rank makes the same one and a resumed run jumps to its step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from esm_neuron.errors import DataError

_NO_EXAMPLES = np.empty(0, np.int32)


@dataclass(frozen=True)
class Recipe:
    """Packs that each hold the same number of sequences of each length."""

    parts: tuple[tuple[int, int], ...]
    """(length in tokens, how many) of the sequences in each pack, longest first."""
    free: int
    """Slots of each pack that are still padding."""
    packs: int
    """How many packs are made so."""

    @property
    def segments(self) -> int:
        return sum(count for _, count in self.parts)


@dataclass(frozen=True)
class EpochPlan:
    """The optimizer steps of an epoch: packs in order, and the examples that lie in each, in compressed sparse rows."""

    pack_tokens: int
    """Slots of a pack."""
    packs_per_step: int
    """Packs of a step over all devices."""
    offsets: np.ndarray
    """int64 [packs + 1]: pack p holds `members[offsets[p]:offsets[p + 1]]`."""
    members: np.ndarray
    """int32 (int64 from 2**31 examples on) [examples]: indices into the example table."""

    @property
    def packs(self) -> int:
        """Return the number of packs that hold examples."""
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return -(-self.packs // self.packs_per_step)

    def pack(self, index: int) -> np.ndarray:
        """Return the examples of one pack in their order, [segments]."""
        return self.members[self.offsets[index] : self.offsets[index + 1]]

    def step(self, index: int) -> list[np.ndarray]:
        """Return the examples of each pack of a step; the last step is filled up with packs that hold none."""
        first = index * self.packs_per_step
        held = [self.pack(p) for p in range(first, min(first + self.packs_per_step, self.packs))]
        return held + [_NO_EXAMPLES] * (self.packs_per_step - len(held))

    def efficiency(self, lengths: np.ndarray, batches: int | None = None) -> float:
        """Return the share of the computed slots that hold tokens; `lengths` [examples] includes specials.

        A step is laid out in `batches`, over all passes and ranks, where each leaves out its filler packs and the
        columns that are padding in all its packs; None: every slot of every pack is computed.
        """
        held = lengths[self.members].astype(np.int64)
        if batches is None:
            return float(held.sum() / (len(self) * self.packs_per_step * self.pack_tokens))
        # `reduceat` sums the tokens of each pack. A batch is as wide as its fullest pack and leaves out empty packs.
        size = self.packs_per_step // batches
        filled = np.add.reduceat(held, self.offsets[:-1])
        filled = np.pad(filled, (0, -self.packs % size)).reshape(-1, size)
        return float(held.sum() / (filled.max(axis=1) * (filled > 0).sum(axis=1)).sum())


def plan_epoch(
    lengths: np.ndarray, pack_tokens: int, max_segments: int, packs_per_step: int, rng: np.random.Generator
) -> EpochPlan:
    """Plan packs that together hold every example once; `lengths`, int [examples], counts tokens with specials.

    `rng` decides which examples of a length take which place, and the order within a pack and of the packs. The packs
    of a step have about as many examples as those of any other: a step's loss is a mean over its examples, so that one
    in a step of few would count for more. The number of packs depends on the length histogram alone. Raise DataError
    where an example fits no pack, or there is none.
    """
    _check_lengths(lengths, pack_tokens)
    counts = np.bincount(lengths)
    recipes = pack_histogram(counts, pack_tokens, max_segments)
    order = _shuffled_by_length(lengths, counts, rng)
    # Examples of one length lie side by side in `order`. Each draw takes the next ones of that stretch, so that every
    # example is used exactly once.
    next_of = np.cumsum(counts) - counts

    def draw(length: int, number: int) -> np.ndarray:
        start = next_of[length]
        next_of[length] += number
        return order[start : start + number]

    return EpochPlan(pack_tokens, packs_per_step, *_fill(recipes, draw, rng, order.dtype, packs_per_step))


def pack_histogram(counts: np.ndarray, pack_tokens: int, max_segments: int) -> list[Recipe]:
    """Return recipes that use every sequence once; `counts` [longest + 1] says how many there are of each length.

    Best fit, longest first: a sequence goes into the open pack with the least room that holds it, or opens a pack.
    """
    # Open recipes by their free slots, and these numbers in order: the tightest fit is found by bisection.
    shelf: dict[int, list[Recipe]] = {}
    gaps: list[int] = []
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
            return Recipe((), pack_tokens, needed)
        gap = gaps[tightest]
        recipe = shelf[gap].pop()
        # An empty shelf must leave `gaps` too, or the next bisection would find it.
        if not shelf[gap]:
            del shelf[gap], gaps[tightest]
        return recipe

    # Longest first: the short sequences then fill the room that the long ones leave.
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            recipe = take(length, left)
            # As many per pack as fit. What `each` does not divide is left over and comes round again in the loop.
            each = min(recipe.free // length, max_segments - recipe.segments, left)
            packs = min(recipe.packs, left // each)
            # Of an open recipe, only as many packs as are needed get these sequences; the others stay open.
            if recipe.parts and packs < recipe.packs:
                store(replace(recipe, packs=recipe.packs - packs))
            store(Recipe((*recipe.parts, (length, each)), recipe.free - length * each, packs))
            left -= each * packs
    return full + [recipe for gap in gaps for recipe in shelf[gap]]


def _check_lengths(lengths: np.ndarray, pack_tokens: int) -> None:
    if len(lengths) == 0:
        raise DataError("there are 0 examples to pack, at least 1 is needed; check the split and data.keep")
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    if lengths[longest] > pack_tokens:
        raise DataError(
            f"example {longest} has {lengths[longest]} tokens, a pack holds {pack_tokens}; use data.pack_tokens >= "
            f"{lengths[longest]}, or crop or window it with data.max_residues <= {pack_tokens - 2}"
        )
    if lengths[shortest] < 1:
        raise DataError(f"example {shortest} has {lengths[shortest]} tokens, at least 1 is needed; remove the record")


def _shuffled_by_length(lengths: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return example indices sorted by length, those of one length in random order."""
    # numpy sorts integers of up to 16 bits by radix, in linear time; few packs are longer than 65,535 tokens.
    keys = lengths.astype(np.min_scalar_type(len(counts)))
    index = np.int32 if len(lengths) < 2**31 else np.int64
    order = np.argsort(keys, kind="stable").astype(index)
    ends = np.cumsum(counts)
    for length in np.flatnonzero(counts):
        rng.shuffle(order[ends[length] - counts[length] : ends[length]])
    return order


def _dealt(segments: np.ndarray, packs_per_step: int, rng: np.random.Generator) -> np.ndarray:
    """Return the packs in the order of an epoch; `segments`, int [packs], says how many examples each holds.

    Each whole step gets one pack of every stratum: those with the fewest examples, with the next few, ..., each drawn
    at random. The packs that make no whole step are drawn from all, and come last.
    """
    shuffled = rng.permutation(np.arange(len(segments), dtype=segments.dtype))
    rest = len(segments) % packs_per_step
    whole = shuffled[rest:]
    strata = whole[np.argsort(segments[whole], kind="stable")].reshape(packs_per_step, -1)
    steps = rng.permuted(rng.permuted(strata, axis=1).T, axis=1)
    return np.concatenate([steps.ravel(), shuffled[:rest]])


def _fill(
    recipes: Sequence[Recipe],
    draw: Callable[[int, int], np.ndarray],
    rng: np.random.Generator,
    index: np.dtype,
    packs_per_step: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an example for each place of each recipe, shuffle within packs, and put the packs in the order of `_dealt`.

    Recipes come longest first: in their own order, an epoch would begin with the long proteins.
    """
    segments = np.repeat(np.array([r.segments for r in recipes], index), [r.packs for r in recipes])
    place = np.empty(len(segments), index)
    place[_dealt(segments, packs_per_step, rng)] = np.arange(len(segments), dtype=index)
    offsets = np.zeros(len(segments) + 1, np.int64)
    # Write how many segments each pack holds to the pack's place, then sum them up to offsets.
    offsets[1:][place] = segments
    np.cumsum(offsets, out=offsets)
    members = np.empty(offsets[-1], index)
    done = 0
    for recipe in recipes:
        # One recipe's packs are filled at once: a column per sequence, shuffled within each pack.
        drawn = [draw(length, count * recipe.packs).reshape(recipe.packs, count) for length, count in recipe.parts]
        packs = rng.permuted(np.concatenate(drawn, axis=1), axis=1)
        starts = offsets[place[done : done + recipe.packs]]
        members[starts[:, None] + np.arange(recipe.segments)] = packs
        done += recipe.packs
    return offsets, members
