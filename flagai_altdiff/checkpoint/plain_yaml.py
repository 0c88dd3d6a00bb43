"""YAML as plain data: no tags or dates, each key once; no aliases or merges, which let few lines stand for gigabytes.

A module of its own, because PyYAML is loaded for a YAML only.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from flagai_altdiff.errors import shown
from flagai_altdiff.plain_data import integer, mapping

_MAX_NESTING = 50
_MAX_VALUES = 5_000
"""A config has some hundred."""
_PREFIX = "tag:yaml.org,2002:"


def parse_yaml(data: bytes) -> Any:
    """Plain mappings, lists and scalars.

    Args:
        data: UTF-8. Numbers are decimal, ``1e-4`` among them; ``yes``, ``on`` and their likes are true and false.

    Raises:
        ValueError: It is no YAML of this kind.
    """
    try:
        return _PlainLoader(data.decode("utf-8-sig")).get_single_data()
    except (yaml.YAMLError, LookupError, AttributeError, OverflowError) as error:  # PyYAML's own, and its slips
        raise ValueError(str(error)) from error


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        self._depth = self._values = 0
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases are not accepted in a config.")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise ValueError(f"YAML tags are not accepted in a config: {shown(tag)}.")
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > _MAX_NESTING:
            raise ValueError(f"it is nested deeper than {_MAX_NESTING} levels.")
        if self._values > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES:,} values; a config.yaml has some hundred.")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not all(isinstance(name, yaml.ScalarNode) and name.value != "<<" for name, _ in node.value):
            raise ValueError("a key is a merge (<<), a list or a mapping, which are not accepted in a config.")
        build = functools.partial(self.construct_object, deep=deep)
        return mapping((build(name), build(value)) for name, value in node.value)


def _resolve(kind: str, pattern: str, first: list[str]) -> None:
    _PlainLoader.add_implicit_resolver(_PREFIX + kind, re.compile(f"(?:{pattern})$"), first)


_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
_resolve("bool", "|".join(f"{w}|{w.title()}|{w.upper()}" for w in "yes no true false on off".split()), [*"yYnNtTfFoO"])
_resolve("null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve("int", "[-+]?(?:0|[1-9][0-9_]*)", [*"-+0123456789"])
_resolve("float", _FLOAT, [*"-+.0123456789"])
_PlainLoader.add_constructor(f"{_PREFIX}int", lambda loader, node: integer(node.value.replace("_", "")))
_PlainLoader.add_constructor(f"{_PREFIX}float", lambda loader, node: float(node.value.replace("_", "")))
