"""The names of classes, as a data set gives them and the models trained on it keep them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""Outside of double quotes."""


@dataclass(frozen=True)
class Classes:
    """The names of classes 0, 1, …; none where they are not known."""

    names: Sequence[str] = ()
    """As the data set has them: folders, or ImageNet's wnids."""
    words: Sequence[str] = ()
    """What people call them, where the data set knows that besides."""

    def __post_init__(self) -> None:
        for field in ("names", "words"):
            value: Any = getattr(self, field)
            if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
                raise ValueError(f"the {field} of its classes are no list of texts")
            object.__setattr__(self, field, tuple(value))
        if self.words and len(self.words) != len(self.names):
            raise ValueError(f"it has {len(self.names)} classes and words for {len(self.words)}")

    @property
    def shown(self) -> list[str]:
        """What to call them on a screen."""
        return list(self.words or self.names)

    def number(self, name: str) -> int:
        """The class that is called `name`: in the data set, or else in words, of which the first
        ones will do ("tench" of "tench, Tinca tinca").

        Raises:
            ValueError: none is, or several are.
        """
        firsts = [words.partition(",")[0] for words in self.words]
        for names in (self.names, self.words, firsts):
            found = [number for number, known in enumerate(names) if known == name]
            if len(found) == 1:
                return found[0]
            if found:
                raise ValueError(f"classes {', '.join(map(str, found))} are all called {name!r}")
        if not self.names:
            raise ValueError(f"{name!r} is no class id, and the model does not know its names")
        raise ValueError(f"there is no class {name!r}: they are {some(self.shown)}")

    def numbers(self, text: str) -> list[int]:
        """The classes in `text`, ids or names with commas between. A name that has a comma or
        looks like a number stands in double quotes, and a double quote in it twice.

        Raises:
            ValueError: a name is no class's, or a number could be an id as well as a name.
        """
        numbers = []
        for part in map(str.strip, COMMA.split(text)):
            if len(part) > 1 and part[0] == part[-1] == '"':
                numbers.append(self.number(part[1:-1].replace('""', '"')))
            elif re.fullmatch(r"-?[0-9]+", part):
                numbers.append(self._id(part))
            else:
                numbers.append(self.number(part))
        return numbers

    def _id(self, digits: str) -> int:
        number = int(digits)
        if digits in self.names and self.names.index(digits) != number:
            raise ValueError(
                f"{digits} is the id of one class and the name of another: put names that are "
                f"""numbers in quotes, as in '"{digits}"'"""
            )
        return number


NAMELESS = Classes()


def some(names: Sequence[str], shown: int = 10) -> str:
    """The first of them, for a sentence."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
