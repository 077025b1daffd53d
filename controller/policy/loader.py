# SPDX-License-Identifier: Apache-2.0
"""Text to plain data, with a limit on everything a hostile document could grow."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_DOCUMENT_BYTES = 64 * 1024
MAX_DEPTH = 12
MAX_NODES = 20_000


class DocumentError(Exception):
    """A document that was rejected whole; `problems` holds every (path, reason) that was found."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{path}: {reason}" if path else reason for path, reason in problems))


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises: `off` stays a word, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            if key in seen:
                line = key_node.start_mark.line + 1
                raise DocumentError([(f"line {line}", f"{key!r} is given twice; keep one")])
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# Only true/false are booleans, and there are no timestamps or base-60 numbers: "10:30" would become 630.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in ("null", "float", "int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


def parse(document: str) -> dict[str, Any]:
    """The top-level mapping of a YAML or JSON document; DocumentError for anything else."""
    size = len(document.encode("utf-8", "surrogatepass"))
    if size > MAX_DOCUMENT_BYTES:
        raise DocumentError([("", f"the document has {size} bytes; at most {MAX_DOCUMENT_BYTES} are accepted")])
    data = _parse_json(document) if document.lstrip().startswith("{") else None
    if data is None:
        data = _parse_yaml(document)
    if not isinstance(data, dict):
        raise DocumentError([("", "the document is not a mapping; start it with 'version: 1'")])
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DocumentError([("", f"{key!r} is given twice in one object; keep one")])
        result[key] = value
    return result


def _parse_json(document: str) -> Any:
    """None where it is not JSON: a YAML document may start with a brace too."""
    try:
        data = json.loads(document, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise DocumentError([("", f"nested deeper than {MAX_DEPTH} levels")]) from None
    except ValueError:
        return None
    _check_depth(data, MAX_DEPTH)
    return data


def _check_depth(data: Any, left: int) -> None:
    if left < 0:
        raise DocumentError([("", f"nested deeper than {MAX_DEPTH} levels")])
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    for child in children:
        _check_depth(child, left - 1)


def _parse_yaml(document: str) -> Any:
    try:
        _check_events(document)
        return yaml.load(document, Loader=_Loader)
    except DocumentError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DocumentError([(where, f"not valid YAML: {error.problem or error.context}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError([("", f"not valid YAML: {error}")]) from None


def _check_events(document: str) -> None:
    """Stop at the first event too many, before anything is built from the document."""
    depth = nodes = documents = 0
    for event in yaml.parse(document, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}" if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent):
            # A few dozen aliases can expand without bound, and a policy needs none.
            raise DocumentError([(line, "aliases are not accepted; write the value out")])
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise DocumentError([(line, "a second document begins here; send one at a time")])
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            if nodes > MAX_NODES:
                raise DocumentError([(line, f"more than {MAX_NODES} values")])
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > MAX_DEPTH:
                raise DocumentError([(line, f"nested deeper than {MAX_DEPTH} levels")])
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
