"""Regular expressions that cannot hang, for patterns that come in a file from somewhere else.

Python's `re` tries one way through a pattern after the other, and `(a|a)*b` has 2^n of them: thirty letters take
minutes. Here all ways are followed at once (Thompson 1968): the state is the *set* of places in the text that
some way has reached, and each part of the pattern makes another set of it. So the work is bounded by the
product of the lengths of pattern and text.

    .*_proj on "q_proj":    {0}    .* {0, 1, … 6}    _ {2}    p {3}    …    j {6}, the end: it matches

The pattern is parsed by `re` itself, so it means what it means there; and where it has few ways, `re` does the
matching. Left out is what depends on the way that was taken: backreferences, possessive and atomic groups. And
the length is bounded, of one pattern and of all in a file, because a product of two lengths can be long too.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 2**12  # characters of one pattern, and together of all that have many ways
MAX_TOTAL = 2**16  # characters of all patterns together
MAX_COSTLY = 16  # looks ahead or behind, and repeats of repeats
MAX_WAYS = 300  # that `re` may try, for a text of at most `SHORT` characters: one star, a few branches
SHORT = 128
SINGLE = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)  # take one character
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
LOOKS = (_constants.ASSERT, _constants.ASSERT_NOT)  # ahead or behind


class PatternError(ValueError):
    """An expression that cannot be read, or not be matched safely; the message says what in it."""


@dataclass
class Walk:
    """What is known of a text while a pattern is matched: a set of places is an int, bit i for place i."""

    text: str
    taken: dict[int, int] = field(default_factory=dict)  # by node: the places of characters that it takes
    held: dict[tuple[int, int], bool] = field(default_factory=dict)  # by node and place: does it hold there?
    reached: dict[tuple[int, int], int] = field(default_factory=dict)  # by what is repeated, and place


Step = Callable[[Walk, int], int]  # the places that are reached, from those that were


def matches_whole(pattern: str, text: str) -> bool:
    """Does `re.fullmatch(pattern, text)` find a match? In time bounded by the product of the lengths.

    >>> matches_whole(r".*\\.(q|k)_proj", "layers.0.q_proj"), matches_whole(r"((\\w|\\.)*)*!", "layers.0.q_proj")
    (True, False)

    Raises:
        PatternError: not an expression, longer than 4,096 characters, or of a kind that is left out here.
    """
    compiled = few_ways(pattern)
    if compiled is not None and len(text) <= SHORT:
        return compiled.fullmatch(text) is not None
    return bool(step_of_pattern(pattern)(Walk(text), 1) >> len(text) & 1)


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise a `PatternError` unless `matches_whole` can read each, and all of them in reasonable time."""
    total = 0
    many_ways = 0
    for pattern in patterns:
        total += len(pattern)
        many_ways += len(pattern) if few_ways(pattern) is None else 0
        if total > MAX_TOTAL or many_ways > MAX_PATTERN:
            raise PatternError(
                f"expressions of more than {MAX_TOTAL:,} characters together, or of more than {MAX_PATTERN:,} "
                "with several stars; give names instead"
            )


def parsed(pattern: str) -> Any:
    """The tree of a pattern, as `re` parses it.

    Raises:
        PatternError: see `matches_whole`.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"an expression of {len(pattern):,} characters; at most {MAX_PATTERN:,} are read")
    try:
        tree = _parser.parse(pattern)
        if costly(tree) > MAX_COSTLY:
            raise PatternError(
                f"an expression with more than {MAX_COSTLY} looks ahead or behind and repeats of repeats"
            )
    except (re.error, RecursionError, OverflowError) as error:
        shown = repr(pattern if len(pattern) <= 60 else pattern[:57] + "…")
        raise PatternError(f"{shown} is not a regular expression ({error})") from None
    return tree


@lru_cache(maxsize=4096)
def few_ways(pattern: str) -> re.Pattern | None:
    """A pattern as `re` compiles it, if that has few ways to try; else None, if it can be matched here."""
    if ways(parsed(pattern)) <= MAX_WAYS:
        return re.compile(pattern)
    step_of_pattern(pattern)
    return None


@lru_cache(maxsize=4096)
def step_of_pattern(pattern: str) -> Step:
    """What matching a pattern makes of a set of places."""
    tree = parsed(pattern)
    return step_of(tree, tree.state.flags)


def ways(tree: Any) -> float:
    """How many ways through a short text `re` may try: an upper bound."""
    product = 1.0
    for op, value in tree:
        if op is _constants.BRANCH:
            product *= sum(ways(branch) for branch in value[1])
        elif op is _constants.SUBPATTERN:
            product *= ways(value[-1])
        elif op in REPEATS and value[1] <= 1:
            product *= 1 + ways(value[2])
        elif op in REPEATS:
            product *= SHORT + 1 if is_single(value[2]) else math.inf
        elif op in LOOKS:
            product *= ways(value[1])
        elif op not in (*SINGLE, _constants.AT):
            product = math.inf  # of a kind that is left out
    return product


def costly(tree: Any) -> int:
    """How many looks ahead or behind, and repeats of more than one character, are in a tree?"""
    count = 0
    for op, value in tree:
        if op is _constants.BRANCH:
            count += sum(costly(branch) for branch in value[1])
        elif op is _constants.SUBPATTERN:
            count += costly(value[-1])
        elif op in REPEATS:
            count += costly(value[2]) + (value[1] > 1 and not is_single(value[2]))
        elif op in LOOKS:
            count += 1 + costly(value[1])
    return count


def is_single(tree: Any) -> bool:
    """Is it one character, of whatever kind?"""
    return len(tree) == 1 and tree[0][0] in SINGLE


def step_of(tree: Any, flags: int) -> Step:
    """What matching all of `tree`, one part after the other, makes of a set of places."""
    steps = [step_of_node(op, value, flags) for op, value in tree]

    def run(walk: Walk, places: int) -> int:
        for step in steps:
            if not places:
                break
            places = step(walk, places)
        return places

    return run


def step_of_node(op: Any, value: Any, flags: int) -> Step:
    """`step_of` for one node.

    Raises:
        PatternError: of a kind that is left out.
    """
    if op in SINGLE:
        return single(op, value, flags)
    if op is _constants.AT:
        anchor = only(op, value, flags)
        return looking(lambda walk, place: anchor.match(walk.text, place) is not None)
    if op is _constants.BRANCH:
        return either([step_of(branch, flags) for branch in value[1]])
    if op is _constants.SUBPATTERN and not value[1] and not value[2]:
        return step_of(value[3], flags)
    if op in REPEATS:
        return repeated(step_of(value[2], flags), value[0], value[1], is_single(value[2]))
    if op in LOOKS:
        (direction, tree), wanted = value, op is _constants.ASSERT
        body, width = step_of(tree, flags), tree.getwidth()[0] if direction < 0 else 0

        def found(walk: Walk, place: int) -> bool:
            reached = body(walk, 1 << place - width) if place >= width else 0
            return (bool(reached >> place & 1) if direction < 0 else reached != 0) == wanted

        return looking(found)
    what = "flags in a group" if op is _constants.SUBPATTERN else str(op).lower().replace("_", " ")
    raise PatternError(f"an expression with {what}, which is not matched here")


def only(op: Any, value: Any, flags: int) -> re.Pattern:
    """One node alone, as `re` compiles it."""
    state = _parser.State()
    state.flags = flags
    return _compiler.compile(_parser.SubPattern(state, [(op, value)]), flags)


def single(op: Any, value: Any, flags: int) -> Step:
    """One character, if it is of that kind."""
    if op is _constants.LITERAL and not flags & re.IGNORECASE:
        takes = chr(value).__eq__
    else:
        kind = only(op, value, flags)
        takes = lru_cache(maxsize=256)(lambda c: kind.fullmatch(c) is not None)

    def step(walk: Walk, places: int) -> int:
        if id(step) not in walk.taken:
            walk.taken[id(step)] = sum(1 << i for i, c in enumerate(walk.text) if takes(c))
        return (places & walk.taken[id(step)]) << 1

    return step


def looking(holds: Callable[[Walk, int], bool]) -> Step:
    """No character: the places stay at which something holds."""

    def step(walk: Walk, places: int) -> int:
        kept = 0
        for place in range(len(walk.text) + 1):
            if places >> place & 1:
                if (id(step), place) not in walk.held:
                    walk.held[id(step), place] = holds(walk, place)
                kept |= walk.held[id(step), place] << place
        return kept

    return step


def either(branches: list[Step]) -> Step:
    """One of the branches."""

    def step(walk: Walk, places: int) -> int:
        found = 0
        for branch in branches:
            found |= branch(walk, places)
        return found

    return step


def repeated(body: Step, least: int, most: int, of_one: bool) -> Step:
    """`body`, from `least` to `most` times; `of_one`: it is one character.

    What is reached from a set is what is reached from each of its places, which is found once (repeats within
    repeats would otherwise be run again and again). Each round takes a character, or takes none and could be
    left out or done again: so what is reached in more rounds than the text has characters is reached in any
    number of them.
    """

    def once(walk: Walk, places: int) -> int:
        if of_one:
            return body(walk, places)
        found = 0
        while places:
            place = places & -places  # the first of them
            places ^= place
            if (id(step), place) not in walk.reached:
                walk.reached[id(step), place] = body(walk, place)
            found |= walk.reached[id(step), place]
        return found

    def step(walk: Walk, places: int) -> int:
        enough = len(walk.text) + 1
        for _ in range(min(least, enough)):
            before, places = places, once(walk, places)
            if places == before:
                break
        found = new = places
        for _ in range(min(most - least, enough)):
            new = once(walk, new) & ~found
            if not new:
                break
            found |= new
        return found

    return step
