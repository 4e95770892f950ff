"""PEFT's name patterns, matched within a bounded time, whoever wrote them.

`rank_pattern` and `alpha_pattern` hold regular expressions that come with an adapter. Python's `re` tries one way through a
pattern after another, and for some patterns their number doubles with each letter of a name. Here all ways are followed at
once: the state of a match is the set of places in the name that it may have come to, held as the bits of a whole number.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from re import _constants as op
from re import _parser as parser
from typing import Any

from anyrank.adapter.bounds import PATTERN_CHARS, PATTERN_WORK, PATTERN_WORK_OF_A_NAME
from anyrank.errors import AdapterError, shortened

_SPECIAL = frozenset("*+?{|()")  # without these there is one way through a pattern, which `re` takes in no time
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)  # which of two ways is tried first does not matter where all are followed
_NESTED = "its groups are nested too deep"
_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S", op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


class Patterns:
    """`{pattern: value}` as PEFT reads it: a module has the value of the first pattern that matches the end of its name.

    Raises `AdapterError` for what is no table of regular expressions, or asks for more than can be matched in a bounded time
    (references to groups, and groups that give nothing back).
    """

    def __init__(self, key: str, table: Any) -> None:
        if not isinstance(table, Mapping):
            told = shortened(repr(table), 100)
            raise AdapterError(f"{key}: expected {{name pattern: number}} in adapter_config.json, got {told}")
        self._key, self._values, self._left = key, list(table.values()), PATTERN_WORK
        # A name from its first letter to its last, as this library writes them: found at once among any number of them.
        self._whole: dict[str, int] = {}
        self._others: list[tuple[int, Callable[[str], bool]]] = []
        for place, pattern in enumerate(table):
            if (name := _whole_name(pattern)) is not None:
                self._whole.setdefault(name, place)
            else:
                self._others.append((place, self._matcher(pattern)))

    def value(self, name: str, default: Any) -> Any:
        """The value for the module `name`; `default` where no pattern matches."""
        end = len(self._values)
        self._left += PATTERN_WORK_OF_A_NAME
        first = min(self._whole.get(name, end), self._whole.get(name.removesuffix("\n"), end))  # `$` allows one line feed
        for place, matches in self._others:
            if place > first:
                break
            if matches(name):
                first = place
                break
        return self._values[first] if first < end else default

    def _matcher(self, pattern: str) -> Callable[[str], bool]:
        if len(pattern) > PATTERN_CHARS:
            raise self._refused(pattern, f"it is longer than {PATTERN_CHARS:,} characters")
        whole = rf"(.*\.)?({pattern})$"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on sets within sets, which another version may read in another way
                if not _SPECIAL & set(pattern):
                    return self._counted(re.compile(whole).match)
                return self._bounded(pattern, parser.parse(whole))
        except RecursionError:
            raise self._refused(pattern, _NESTED) from None
        except (re.error, OverflowError) as error:
            raise self._refused(pattern, f"{error}") from None

    def _counted(self, match: Callable[[str], Any]) -> Callable[[str], bool]:
        def matches(name: str) -> bool:
            self._work("", 1 + len(name) // 64)
            return match(name) is not None

        return matches

    def _bounded(self, pattern: str, tree: Any) -> Callable[[str], bool]:
        def matches(name: str) -> bool:
            try:
                return _Match(name, lambda work: self._work(pattern, work)).found(tree)
            except NotImplementedError as what:
                raise self._refused(pattern, f"{what} cannot be matched in a bounded time; write it without") from None
            except RecursionError:
                raise self._refused(pattern, _NESTED) from None

        return matches

    def _work(self, pattern: str, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise self._refused(pattern, "it takes too long to match; write simpler patterns, or fewer")

    def _refused(self, pattern: str, why: str) -> AdapterError:
        told = repr(shortened(pattern, 100))
        return AdapterError(f"{self._key}: expected regular expressions in adapter_config.json, got {told} ({why})")


def _whole_name(pattern: str) -> str | None:
    """The one name that `^` before an escaped name matches; `None` for any other pattern."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:], flags=re.DOTALL)
    return name if pattern.startswith("^") and re.escape(name) == pattern[1:] else None


class _Match:
    """One name under one pattern. `work` is told each step, and may raise.

    A set of places is a whole number: bit i stands for the place before letter i.
    """

    def __init__(self, name: str, work: Callable[[int], None]) -> None:
        self._name, self._work, self._cost = name, work, 1 + len(name) // 512
        self._places = (1 << (len(name) + 1)) - 1
        self._letters: dict[str, int] = {}
        for i, letter in enumerate(name):
            self._letters[letter] = self._letters.get(letter, 0) | 1 << i

    def found(self, tree: Any) -> bool:
        return bool(self._run(tree, 1))

    def _run(self, nodes: Any, places: int) -> int:
        """The places that `nodes`, one after another, lead to from `places`."""
        for kind, what in nodes:
            if not places:
                break
            self._work(self._cost)
            places = self._step(kind, what, places)
        return places

    def _step(self, kind: Any, what: Any, places: int) -> int:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return (places & self._where(kind, what)) << 1
        if kind in _REPEATS:
            return self._repeat(*what, places)
        if kind is op.SUBPATTERN:
            _, add, drop, inner = what
            if add or drop:
                raise NotImplementedError("a flag")
            return self._run(inner, places)
        if kind is op.BRANCH:
            return self._any(what[1], places)
        if kind is op.AT:
            return places & self._at(what)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            return self._look(*what, places, wanted=kind is op.ASSERT)
        raise NotImplementedError(f"{kind}".lower())

    def _any(self, ways: Any, places: int) -> int:
        found = 0
        for way in ways:
            found |= self._run(way, places)
        return found

    def _repeat(self, least: int, most: int, inner: Any, places: int) -> int:
        # A place is left for a later one or, where nothing is taken in, for itself: after as many turns as there are places
        # the set stays as it is.
        for _ in range(min(least, len(self._name) + 2)):
            before, places = places, self._run(inner, places)
            if places == before:
                break
        if most is op.MAXREPEAT and [node[0] for node in inner] == [op.ANY] and "\n" not in self._name:
            return self._places & -(places & -places)  # all that follow the first one, at once: each pattern begins with it
        found = new = places
        for _ in range(min(most - least, len(self._name) + 2)):
            new = self._run(inner, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _look(self, way: int, inner: Any, places: int, wanted: bool) -> int:
        """The places from which `inner` matches ahead, or before which it matches behind; or those where it does not."""
        width = inner.getwidth()[0] if way < 0 else 0
        kept = 0
        for place in (i for i in range(len(self._name) + 1) if places >> i & 1):
            self._work(self._cost)
            start = place - width
            ends = self._run(inner, 1 << start) if start >= 0 else 0
            if bool(ends >> place & 1 if way < 0 else ends) is wanted:
                kept |= 1 << place
        return kept

    def _where(self, kind: Any, what: Any) -> int:
        """The places before a letter that one letter of the pattern takes."""
        if kind is op.LITERAL:
            return self._letters.get(chr(what), 0)
        if kind is op.ANY:
            return (self._places >> 1) & ~self._letters.get("\n", 0)
        if kind is op.NOT_LITERAL:
            return (self._places >> 1) & ~self._letters.get(chr(what), 0)
        return sum(where for letter, where in self._letters.items() if _within(letter, what))

    def _at(self, what: Any) -> int:
        last = len(self._name)
        if what in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return 1
        if what is op.AT_END_STRING:
            return 1 << last
        if what is op.AT_END:
            return 1 << last | (1 << (last - 1) if self._name.endswith("\n") else 0)
        if what not in (op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
            raise NotImplementedError(f"{what}".lower())
        words = sum(where for letter, where in self._letters.items() if re.match(r"\w", letter))
        edges = words ^ (words << 1)
        if what is op.AT_BOUNDARY:
            return edges
        return self._places & ~edges if self._name else 0  # `re` finds neither in an empty text


def _within(letter: str, items: Any) -> bool:
    """Whether a letter is of a set, `[...]`."""
    negated = items[0][0] is op.NEGATE
    return any(_is(letter, kind, what) for kind, what in items[negated:]) is not negated


def _is(letter: str, kind: Any, what: Any) -> bool:
    if kind is op.LITERAL:
        return ord(letter) == what
    if kind is op.RANGE:
        return what[0] <= ord(letter) <= what[1]
    return re.match(_CATEGORIES[what], letter) is not None
