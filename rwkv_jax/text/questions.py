"""Questions whose answers are known or asked for: with choices, or a text whose end is to be given word for word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Normalise = Literal["none", "tokens", "bytes", "unconditional"]
"""What a choice's log-likelihood is made comparable by: nothing; divided by its tokens, or by its bytes; or less the log-likelihood
that it has without the text, which takes away how common the choice is."""


@dataclass(frozen=True)
class Question:
    """A text and the choices of what follows it, or of what fills the blank in it."""

    text: str
    choices: Sequence[str]
    blank: str | None = None
    """What marks the blank in the text; none: the choice follows the text."""
    separator: str = " "
    """Between the text and the choice that follows it."""
    gold: int | None = None
    """Index of the right choice, where it is known."""

    def __post_init__(self):
        object.__setattr__(self, "choices", tuple(self.choices))  # Hashable, and no one else's list.
        if len(self.choices) < 2:
            raise ValueError(f"choices is {list(self.choices)}; give at least two")
        if "" in self.choices:
            raise ValueError(f"choice {self.choices.index('')} is empty; each must have some text")
        for i, choice in enumerate(self.choices):
            if choice in self.choices[:i]:
                raise ValueError(f"choices {self.choices.index(choice)} and {i} are both {choice!r}; leave one out")
        if self.gold is not None and not 0 <= self.gold < len(self.choices):
            raise ValueError(
                f"gold is {self.gold}; with {len(self.choices)} choices it must be 0 to {len(self.choices) - 1}"
            )
        if self.blank is not None:
            if not self.blank:
                raise ValueError("blank is empty; give the mark that stands for it, such as '_'")
            if (found := self.text.count(self.blank)) != 1:
                raise ValueError(
                    f"the text has {found or 'no'} {'blanks' if found else 'blank'} {self.blank!r}; it must have one "
                    "(blank= names another mark)"
                )

    @property
    def context(self) -> str:
        """What stands before the choice."""
        return self.text if self.blank is None else self.text.partition(self.blank)[0]

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored of each choice: with a blank, the rest of the text belongs to it."""
        before = self.separator if self.blank is None else ""
        after = "" if self.blank is None else self.text.partition(self.blank)[2]
        return tuple(before + choice + after for choice in self.choices)


@dataclass(frozen=True)
class Completion:
    """A text without choices and what must follow it."""

    context: str
    """What stands before."""
    answer: str
    """What follows, with the white space between."""

    def __post_init__(self):
        if not self.answer.strip():
            raise ValueError(f"the answer is {self.answer!r}; it must have some text")

    @property
    def continuations(self) -> tuple[str]:
        """The answer, as in `Question`."""
        return (self.answer,)

    @property
    def gold(self) -> int:
        """Index of the answer among the continuations."""
        return 0


class Item(NamedTuple):
    """A question of a set."""

    name: str
    """Where it comes from, such as a file and a line."""
    question: Question | Completion
    """With its answer."""

    @property
    def gold(self) -> str:
        """The right continuation.

        Raises:
            ValueError: The question does not say which it is.
        """
        index = self.question.gold
        if index is None:
            raise ValueError(f"{self.name}: the question has no gold, the index of its right choice; give it")
        return self.question.continuations[index]
