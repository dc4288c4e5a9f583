"""What a config can choose by name, and the config class that follows from the choice.

A method, gate, head or growth rule is a `Component`: it declares its keys in its own file. Packages above register their
tables of names here (`register`); the config of a run then has the keys that every run has and those of the components that it
chose, and no list anywhere names the keys of another component.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from pydantic import create_model
from pydantic.fields import FieldInfo

from utils.config.keys import Config, KeyGroup
from utils.config.rules import show
from utils.errors import nearest


class Component:
    """Something that a config chooses by its name in a registered table.

    Keys: the config keys that it adds. The first sentence of its docstring is shown where the config's keys are described.
    always_known: its keys may be given whichever entry of its table is chosen.
    """

    class Keys(KeyGroup):
        """None."""

    always_known: ClassVar[bool] = False

    @classmethod
    def objections(cls, config: Config) -> Iterator[str]:
        """As `contradictions`, for what all components of a kind say of themselves: those of a component replace nothing."""
        return iter(())

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        """Sentences, without a full stop, on keys that cannot stand together; each names its keys in single quotes."""
        return iter(())

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """What to say once about a valid config."""
        return []


# Key that chooses -> name -> component. In this order: a choice may be a key of what an earlier one has chosen.
CHOICES: dict[str, Mapping[str, type[Component]]] = {}


class UnknownName(Exception):
    """A choice that is not in its table: the key, and what is wrong in words."""

    def __init__(self, key: str, complaint: str) -> None:
        super().__init__(complaint)
        self.key = key


def register(**tables: Mapping[str, type[Component]]) -> None:
    """Makes the entries of `tables` what their keys may name: `register(head=HEADS)`."""
    CHOICES.update(tables)


def chosen(values: Mapping[str, Any]) -> dict[str, type[Component]]:
    """Every choice that `values` make or leave at its default, in the order of `CHOICES`; raises UnknownName."""
    assert CHOICES, "import models first: the keys of a config are declared there"
    found: dict[str, type[Component]] = {}
    for key, table in CHOICES.items():
        field = _fields([*(part.Keys for part in found.values()), Config]).get(key)
        if field is None:
            continue
        name = field.default if values.get(key) is None else values[key]
        if not isinstance(name, str) or name not in table:
            near = nearest(name, table) if isinstance(name, str) else ""
            raise UnknownName(key, f"'{key}' is {show(name)}; it must be {one_of(table)}.{near}")
        found[key] = table[name]
    return found


def config_class(choices: Mapping[str, type[Component]]) -> type[Config]:
    """The class of configs that make these `choices`.

    A component stands in for another chosen one that it inherits from. Of two that declare the same key the one that was
    chosen later counts; those of `always_known` tables come last.
    """
    parts = [part for part in choices.values() if not any(other is not part and issubclass(other, part)
                                                          for other in choices.values())]
    also = [part for key in choices for part in CHOICES[key].values() if part.always_known]
    return _config_class(tuple(parts), tuple(also))


@functools.cache
def _config_class(parts: tuple[type[Component], ...], also: tuple[type[Component], ...]) -> type[Config]:
    ordered = sorted(reversed(parts), key=lambda part: part.always_known)
    groups = list(dict.fromkeys(part.Keys for part in (*ordered, *also)))
    bases = [group for group in groups if not any(other is not group and issubclass(other, group) for other in groups)]
    made = create_model("Config", __base__=(*bases, Config), __doc__=Config.__doc__)
    made.components = parts
    return made


def owners(key: str) -> list[tuple[str, type[Component]]]:
    """Every registered component with the key, and the choice by which it is named."""
    return [(choice, part) for choice, table in CHOICES.items() for part in table.values() if key in part.Keys.model_fields]


def choice_of(part: type[Component]) -> str:
    """The key by whose value a registered component is chosen."""
    return next(key for key, table in CHOICES.items() if part in table.values())


def known_keys() -> dict[str, FieldInfo]:
    """Every key of every component, as the first that has it declares it."""
    return _fields([Config, *(part.Keys for table in CHOICES.values() for part in table.values())])


def one_of(names: Iterable[str]) -> str:
    """`one of "a", "b"`."""
    return f"one of {', '.join(show(name) for name in names)}"


def _fields(groups: Iterable[type[KeyGroup]]) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = {}
    for group in groups:
        fields |= {key: field for key, field in group.model_fields.items() if key not in fields}
    return fields
