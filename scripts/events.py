"""`orion events`: what the lines of event logs hold, as JSON Schema and as docs/events.md, made from the types."""

from __future__ import annotations

import ast
import inspect
import json

from pydantic import TypeAdapter

from neurons import telemetry
from neurons.telemetry import EVENTS, SCHEMA

Json = dict[str, object]

_PAGE = """# Event logs

A node writes what happens to it into one file, `events/NAME.jsonl` in its `--out` folder, and `orion localnet` what it
does to nodes into `events/localnet.jsonl`. Nothing else is read by the terminal view, the web page, metrics, summaries
and `orion score explain`. A line is a JSON object with `t`, seconds since the epoch; `v`, the version of the schema;
`kind`; and the fields of that kind, all of them. Lines are only ever appended; a process that is killed may leave one
unfinished, which readers pass over.

The version goes up with every release that adds, changes or drops a kind or a field. Readers refuse lines of another:
look at such a run with the Orion that wrote it. `orion events schema` prints the JSON Schema (2020-12) of a line.

This page is what `orion events page` prints, for schema {schema}.
"""


def schema() -> Json:
    """Of a line."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of an Orion event log, schema {SCHEMA}",
        "oneOf": [_kind(name) for name in EVENTS],
    }


def page() -> str:
    """docs/events.md."""
    notes = _notes()
    lines = [_PAGE.format(schema=SCHEMA)]
    for name, kind in EVENTS.items():
        types = {field: _words(one) for field, one in _fields(name).items()}
        told = notes[kind.__name__]
        lines += [f"## {name}", "", *([inspect.cleandoc(kind.__doc__), ""] if kind.__doc__ else [])]
        lines += [f"* `{field}`: {words}{_end(told.get(field))}" for field, words in types.items()]
        lines.append("")
    return "\n".join(lines)


def print_schema() -> int:
    print(json.dumps(schema(), indent=2))
    return 0


def print_page() -> int:
    print(page(), end="")
    return 0


def _kind(name: str) -> Json:
    fields, kind = _fields(name), EVENTS[name]
    notes = _notes()[kind.__name__]
    described = {
        field: one | ({"description": notes[field]} if field in notes else {}) for field, one in fields.items()
    }
    head = {"t": {"type": "number"}, "v": {"const": SCHEMA}, "kind": {"const": name}}
    found: Json = {"description": inspect.cleandoc(kind.__doc__)} if kind.__doc__ else {}
    properties = head | described
    return found | {"properties": properties, "required": list(properties), "additionalProperties": False}


def _fields(name: str) -> dict[str, Json]:
    """JSON Schema of each field of a kind of event."""
    properties: dict[str, Json] = TypeAdapter(EVENTS[name]).json_schema()["properties"]
    return {field: {key: value for key, value in one.items() if key != "title"} for field, one in properties.items()}


def _words(field: Json) -> str:
    """Its type for a person."""
    match field:
        case {"anyOf": list(types)}:
            return " or ".join(_words(one) for one in types)
        case {"type": "array", "items": dict(items)}:
            return f"array of {_words(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object with values of {_words(values)}"
    return str(field["type"])


def _notes() -> dict[str, dict[str, str]]:
    """The strings that stand below fields, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for kind in ast.parse(inspect.getsource(telemetry)).body:
        if isinstance(kind, ast.ClassDef):
            notes = found[kind.name] = {}
            for before, line in zip(kind.body, kind.body[1:], strict=False):
                match before, line:
                    case ast.AnnAssign(target=ast.Name(id=field)), ast.Expr(value=ast.Constant(value=str(text))):
                        notes[field] = inspect.cleandoc(text)
    return found


def _end(note: str | None) -> str:
    return "" if note is None else f". {' '.join(note.split())}"
