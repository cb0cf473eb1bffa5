"""What a compiled program says of itself: its collectives, read off XLA's HLO text."""

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?\("
)


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """Returns how often each collective of an HLO program runs, and the bytes of its results on a device, loops counted."""
    times = defaultdict(lambda: 1, multiplicities(program))
    # A TPU's compiler writes one collective into several computations, a chain that shares its channel. Without a chain, those of a
    # shard_map may have one channel, too, and are others.
    every: dict[tuple[str, str], tuple[int, int]] = {}
    for computation, lines in computations(program):
        for line in lines:
            if match := COLLECTIVE.search(line):
                sizes = [size_of(kind, dims) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
                if match[3] and match[2] != "all-reduce":  # A start's result holds what it was given, first.
                    sizes = sizes[1:2] if match[2] == "collective-permute" else sizes[len(sizes) // 2 :]
                chain = re.search(r"channel_id=(\d+).*chain_id=", line)
                own = match[2], chain[1] if chain else f"{computation} {line}"
                every[own] = max(every.get(own, (0, 0)), (times[computation], sum(sizes)))
    found: dict[str, tuple[int, int]] = {}
    for (name, _), (count, size) in every.items():
        executions, total = found.get(name, (0, 0))
        found[name] = executions + count, total + size * count
    return found


def size_of(kind: str, dims: str) -> int:
    """Returns the bytes of an HLO shape."""
    return BYTES.get(kind, 0) * int(np.prod([int(dim) for dim in dims.split(",") if dim]))


def computations(program: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and lines of every computation of an HLO program."""
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", program):
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            yield match[1], block.splitlines()[1:]


def multiplicities(program: str) -> dict[str, int]:
    """Returns how often each loop's body runs in a step; a loop of unknown count counts once."""
    inner: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for computation, lines in computations(program):
        for line in lines:
            known = re.search(r"known_trip_count\D*(\d+)", line)
            for body in re.findall(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)", line):
                inner[computation].append((body, int(known[1]) if known and " while(" in line else 1))
    found: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        found[name] = max(found.get(name, 0), times)
        for body, count in inner[name]:
            visit(body, times * count)

    bodies = {body for calls in list(inner.values()) for body, _ in calls}
    for name in [name for name in inner if name not in bodies]:
        visit(name, 1)
    return found
