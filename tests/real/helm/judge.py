"""Judges Kubernetes objects that stand on standard input as YAML; `judge.py objects`, `judge.py problems 1.33`: prints JSON.

Run by the environment of `requirements.lock` beside it. `objects` prints them. `problems` prints what is wrong: a field that
this version of Kubernetes does not have, a wrong kind of value, an expression that is not PromQL. The kinds of the
Prometheus Operator are not in Kubernetes: `schemas/` has our own minimal ones, which know the fields that the chart uses.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The environment beside the requirements has these; the broker's, which types and imports are checked in, does not.
kubernetes_validate: Any = importlib.import_module("kubernetes_validate")
promql_parser: Any = importlib.import_module("promql_parser")
yaml: Any = importlib.import_module("yaml")
Draft7Validator: Any = importlib.import_module("jsonschema").Draft7Validator

SCHEMAS = Path(__file__).resolve().parent / "schemas"


def _mapping(loader: Any, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - the base's signature
    """Return the mapping; refuse a name that stands twice, of which the first would be lost without a word."""
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise yaml.YAMLError(f"{sorted(twice)} stand twice{node.start_mark}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


Strict = type("Strict", (yaml.SafeLoader,), {"construct_mapping": _mapping})


def main(arguments: list[str]) -> int:
    """Print a list as JSON, and return 0 whatever is in it."""
    objects = [one for one in yaml.load_all(sys.stdin.read(), Loader=Strict) if one is not None]
    if arguments == ["objects"]:
        found: list[Any] = objects
    else:
        found = [f"{_name(one)}: {problem}" for one in objects for problem in _problems(one, arguments[1])]
    json.dump(found, sys.stdout)
    return 0


def _name(one: dict[str, Any]) -> str:
    return f"{one.get('kind')}/{one.get('metadata', {}).get('name')}"


def _problems(one: dict[str, Any], version: str) -> Iterator[str]:
    if str(one.get("apiVersion", "")).startswith("monitoring.coreos.com/"):
        yield from _by_our_schema(one)
        yield from _wrong_expressions(one)
        return
    try:
        kubernetes_validate.validate(one, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{list(error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield "no such kind"


def _by_our_schema(one: dict[str, Any]) -> Iterator[str]:
    place = SCHEMAS / f"{one['kind'].lower()}.json"
    if not place.is_file():
        yield "no schema for this kind"
        return
    for error in Draft7Validator(json.loads(place.read_text("utf-8"))).iter_errors(one):
        yield f"{list(error.path)}: {error.message}"


def _wrong_expressions(one: dict[str, Any]) -> Iterator[str]:
    for group in one.get("spec", {}).get("groups", []):
        for rule in group["rules"]:
            try:
                promql_parser.parse(rule["expr"])
            except ValueError as error:
                yield f"{rule['alert']}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
