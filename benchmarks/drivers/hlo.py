"""Reads compiled programs (HLO text): what a GPU is asked to launch, loop by loop."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

# Operations that launch nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"= \(?.*?\)? ([a-z][\w\-]*)\(")


class Launch(NamedTuple):
    """A kernel or a library call.

    **Fields:** `kind`: the operation, or the name of the library call; `source`: JAX's name of the
    operation; `times`: launches of it in one trip of its loop.
    """

    kind: str
    source: str
    times: int


class Loop(NamedTuple):
    """A loop of a program; the program itself is a loop of one trip.

    **Fields:** `trips`: `None` if not known when compiling, which counts as 1; `launches`: of one
    trip, with inner loops multiplied out, and of all branches of a conditional; `loops`: directly
    inside.
    """

    trips: int | None
    launches: list[Launch]
    loops: list["Loop"]

    @property
    def total(self) -> int:
        """Launches of one trip."""
        return sum(launch.times for launch in self.launches)

    def everywhere(self) -> Iterator["Loop"]:
        """This loop and all loops inside it."""
        yield self
        for loop in self.loops:
            yield from loop.everywhere()

    def table(self) -> dict[str, int]:
        """Launches of one trip by kind and source, most frequent first."""
        counts: Counter[str] = Counter()
        for launch in self.launches:
            counts[f"{launch.kind}: {launch.source}"] += launch.times
        return dict(counts.most_common())


def read(text: str) -> Loop:
    """The program of a compiled module's text."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif re.match(r"\s+(ROOT )?%", line):
            computations[name].append(line)
    if not entry:
        raise ValueError("this text has no ENTRY computation: give that of a compiled module")
    return _loop(computations, entry, 1)


def _loop(computations: dict[str, list[str]], name: str, trips: int | None) -> Loop:
    launches: list[Launch] = []
    loops: list[Loop] = []
    for line in computations.get(name, ()):
        operation = _OPERATION.search(re.sub(r"/\*.*?\*/", "", line))
        kind = operation[1] if operation else "?"
        if kind in _FREE or kind.endswith("-done"):
            continue
        if kind == "while":
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            inner = _loop(computations, _called(line, "body"), int(known[1]) if known else None)
            if inner.trips is None:  # else XLA counts the trips itself
                condition = _loop(computations, _called(line, "condition"), None)
                inner = inner._replace(launches=inner.launches + condition.launches)
            loops.append(inner)
            times = inner.trips or 1
            launches += [each._replace(times=times * each.times) for each in inner.launches]
        elif kind in ("call", "conditional"):
            called = re.findall(r"(?:to_apply|calls|branch_computations)=\{?([\w.\-, %]+)", line)
            for each in ",".join(called).split(","):
                inside = _loop(computations, each.strip().lstrip("%"), 1)
                launches += inside.launches
                loops += inside.loops
        else:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            source = re.search(r'op_name="([^"]*)"', line)
            launches.append(Launch(target[1] if target else kind, source[1] if source else "", 1))
    return Loop(trips, launches, loops)


def _called(line: str, role: str) -> str:
    found = re.search(rf"{role}=%?([\w.\-]+)", line)
    assert found, line
    return found[1]


def counts(update: Loop, rollout_length: int, num_minibatches: int) -> dict[str, Any]:
    """Launches of one update, and of its steps.

    **Arguments:** `update`: the loop over updates. `rollout_length`, `num_minibatches`: trips of
    the loops inside it that act, and that take gradient steps.
    """

    def largest(trips: int, learns: bool) -> Loop | None:
        def fits(loop: Loop) -> bool:
            backwards = any("transpose(" in launch.source for launch in loop.launches)
            return loop.trips == trips and backwards == learns and loop is not update

        return max(filter(fits, update.everywhere()), key=lambda loop: loop.total, default=None)

    steps = {
        "env_step": largest(rollout_length, learns=False),
        "gradient_step": largest(num_minibatches, learns=True),
    }
    found = {name: loop for name, loop in steps.items() if loop is not None}
    return {
        "update": update.total,
        **{name: loop.total for name, loop in found.items()},
        "kernels": {name: loop.table() for name, loop in (found or {"update": update}).items()},
    }
