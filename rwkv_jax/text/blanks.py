"""Blanks: questions made from text alone. A word of a line is removed, and the choices are words of the lines around it."""

import heapq
import random
import re
from collections.abc import Iterable, Iterator

from .corpora import Document
from .questions import Item, Question

MARK = "<blank>"
"""What stands for the removed word."""
NUM_CHOICES = 4
LINES_AROUND = 8
"""Lines before and after the blank's own that choices are drawn from."""
_WORD = re.compile(r"\b[^\W\d]\w{2,}")
"""Identifiers and words, of at least three letters: shorter ones are mostly names of loops and operators."""


def make_blanks(documents: Iterable[Document], *, most_bytes: int, seed: int, limit: int | None) -> list[Item]:
    """Returns questions about lines of the documents, in an order that is drawn, too.

    The text is the line with a blank and as many whole lines before it as fit; what is scored of a choice is the choice and the rest
    of the line. The same documents, sizes and seed give the same questions.

    Args:
        documents: Of one side of a split.
        most_bytes: Of the text with its blank filled; longer lines are passed over.
        seed: Of the lines, words and choices.
        limit: How many at most, drawn from all lines alike; None: one for every line that has a word and enough others around it.
    """
    drawn = (blank for document in documents for blank in _blanks(document, most_bytes, seed))
    chosen = sorted(drawn) if limit is None else heapq.nsmallest(limit, drawn)
    return [
        Item(f"{name}:{number}", Question(text, choices, blank=MARK, gold=gold))
        for _, name, number, text, choices, gold in chosen
    ]


def _blanks(
    document: Document, most_bytes: int, seed: int
) -> Iterator[tuple[float, str, int, str, tuple[str, ...], int]]:
    """(where it comes in the order, document, number of the line, text, choices, gold) of every line that makes one."""
    rng = random.Random(f"{seed}/{document.name}")
    text = document.text if isinstance(document.text, str) else document.text.decode(errors="replace")
    lines = text.splitlines()
    words = [_WORD.findall(line) for line in lines]
    for i, line in enumerate(lines):
        if not words[i]:
            continue
        place, match = rng.random(), rng.choice(list(_WORD.finditer(line)))
        near = (*words[max(i - LINES_AROUND, 0) : i], *words[i + 1 : i + 1 + LINES_AROUND])
        around = [word for own in near for word in own]
        # In the order of the lines, since that of a set differs from one process to the next.
        others = [word for word in dict.fromkeys(around) if word != match[0]]
        room = most_bytes - len(line.encode())
        if len(others) < NUM_CHOICES - 1 or room < 0 or MARK in line:
            continue
        choices = [match[0], *rng.sample(others, NUM_CHOICES - 1)]
        rng.shuffle(choices)
        first = i
        while first > 0 and (room := room - len(lines[first - 1].encode()) - 1) >= 0 and MARK not in lines[first - 1]:
            first -= 1
        before = "".join(f"{own}\n" for own in lines[first:i])
        blank = before + line[: match.start()] + MARK + line[match.end() :]
        yield place, document.name, i + 1, blank, tuple(choices), choices.index(match[0])
