"""/docs: the OpenAPI description as one page without a script, which asks nobody else for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
code { font-family: ui-monospace, monospace; font-size: 0.9em; }
summary { cursor: pointer; padding: 0.4rem 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.75rem 0.25rem 0; border-top: 1px solid #8884; }
nav { columns: 3 16rem; }
section { border-top: 2px solid #8888; margin-top: 1.5rem; }
"""
_POLICY = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The page."""
    return HTMLResponse(render(request.app.openapi()), headers={"content-security-policy": _POLICY})


def render(api: Mapping[str, Any]) -> str:
    """An OpenAPI description as HTML."""
    title = escape(f"{api['info']['title']} {api['info']['version']}")
    schemas: Mapping[str, Any] = api.get("components", {}).get("schemas", {})
    operations = [
        (method.upper(), path, operation) for path, item in api["paths"].items() for method, operation in item.items()
    ]
    return "".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width"><style>',
            f"{_STYLE}</style></head><body><main><h1>{title}</h1><p>{escape(api['info'].get('description', ''))}</p>",
            '<p>The same for programs: <a href="/openapi.json">openapi.json</a></p><h2>Endpoints</h2>',
            *(part for operation in operations for part in _operation(*operation)),
            "<h2>Objects</h2><nav><ul>",
            *(f'<li><a href="#{escape(name)}">{escape(name)}</a></li>' for name in schemas),
            "</ul></nav>",
            *(part for name, schema in schemas.items() for part in _schema(name, schema)),
            "</main></body></html>",
        ]
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details><summary><code>{method} {escape(path)}</code> {escape(operation.get('description', ''))}</summary>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield f"<p>Request: {_type(body)}</p>"
    yield "<table><thead><tr><th>Status</th><th>Answer</th><th></th></tr></thead><tbody>"
    for status, response in operation.get("responses", {}).items():
        schema = response.get("content", {}).get("application/json", {}).get("schema")
        yield f"<tr><td>{escape(status)}</td><td>{_type(schema) if schema else ''}</td>"
        yield f"<td>{escape(response.get('description', ''))}</td></tr>"
    yield "</tbody></table></details>"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section id="{escape(name)}"><h3>{escape(name)}</h3><p>{escape(schema.get("description", ""))}</p>'
    properties: Mapping[str, Any] = schema.get("properties", {})
    if properties:
        yield "<table><thead><tr><th>Parameter</th><th>Type</th><th></th></tr></thead><tbody>"
        for field, value in properties.items():
            mark = " (required)" if field in schema.get("required", ()) else ""
            yield f"<tr><td><code>{escape(field)}</code>{mark}</td><td>{_type(value)}</td>"
            yield f"<td>{escape(value.get('description', ''))}</td></tr>"
        yield "</tbody></table>"
    yield "</section>"


def _type(schema: Mapping[str, Any]) -> str:
    """A type in words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return " or ".join(_type(option) for option in options)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "anything"))) + escape(_range(schema))


def _range(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return f" {' '.join(found)}" if found else ""
