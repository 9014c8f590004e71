"""Renders the OpenAPI document as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_HEAD = """# API reference

Generated from the OpenAPI document at `/openapi.json` by `python -m stable_diffusion_server api`; a test compares the
two. Errors are `application/problem+json`. The OpenAI and AUTOMATIC1111 endpoints use the error schemas of those APIs
([openai-and-automatic1111.md](openai-and-automatic1111.md)). Send an API key as `Authorization: Bearer …`, as
`X-API-Key: …` or as the password of HTTP Basic. Complete example requests and answers: [http-api.md](http-api.md).
"""
_TAGS = {
    "draw": "Generation",
    "jobs": "Jobs",
    "openai": "OpenAI Images",
    "automatic1111": "AUTOMATIC1111",
    "operate": "Images and the server itself",
}


def openapi_markdown(document: Mapping[str, Any]) -> str:
    """Return the page of a document."""
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation.get("tags", ["operate"])[0], []).append((method.upper(), path, operation))
    lines = [_HEAD]
    for tag, title in _TAGS.items():
        lines += [f"## {title}", ""]
        for method, path, operation in by_tag.get(tag, ()):
            lines += [f"### `{method} {path}`", "", *_operation(method, operation), ""]
    return "\n".join(lines).rstrip() + "\n"


def _operation(method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield _sentence(operation.get("description") or operation.get("summary", ""))
    yield ""
    fields = _fields(operation)
    if method == "GET" and operation.get("tags") == ["draw"]:
        yield "The parameters of `POST`, without files, as a query string."
        yield ""
    elif fields:
        yield from ("| parameter | type | meaning |", "| --- | --- | --- |")
        for name, required, schema in fields:
            kind = _kind(schema).replace("|", "or")
            meaning = " ".join(str(schema.get("description", "")).split())
            yield f"| `{name}`{' (required)' if required else ''} | {kind} | {meaning} |"
        yield ""
    if body := operation.get("requestBody"):
        yield f"Sent as {_listed(f'`{kind}`' for kind in body['content'])}."
    successes = [_success(status, response) for status, response in operation["responses"].items() if status < "4"]
    errors = [status for status in operation["responses"] if "4" <= status < "6"]
    yield f"Returns {_listed(successes)}. Errors: {_listed(errors)}."


def _fields(operation: Mapping[str, Any]) -> list[tuple[str, bool, dict[str, Any]]]:
    """Return name, required and schema of each parameter; with several bodies, of the one with the most parameters."""
    found = [
        (part["name"], part.get("required", False), {**part["schema"], "description": part.get("description", "")})
        for part in operation.get("parameters", ())
    ]
    schemas = [content["schema"] for content in operation.get("requestBody", {}).get("content", {}).values()]
    if schemas:
        widest = max(schemas, key=lambda schema: len(schema.get("properties", {})))
        required = widest.get("required", ())
        found += [(name, name in required, schema) for name, schema in widest.get("properties", {}).items()]
    return found


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the type of a value in a few words."""
    if "anyOf" in schema:
        kinds = [_kind(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return _listed(dict.fromkeys(kinds), "or")
    if isinstance(schema.get("type"), list):
        return _kind({**schema, "type": schema["type"][0]})
    if "enum" in schema:
        return _listed((f"`{value}`" for value in schema["enum"]), "or")
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("format") == "binary":
        return "file"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    kind = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}.get(
        str(schema.get("type")), "object"
    )
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:,.12g}" if high >= 10_000 else f"{kind}, {low:g} to {high:g}"
    return kind if low is None else f"{kind} from {low:g}"


def _success(status: str, response: Mapping[str, Any]) -> str:
    kinds = []
    for media_type, content in response.get("content", {}).items():
        schema = content.get("schema", {})
        name = {**schema, **schema.get("items", {})}.get("$ref", "").rpartition("/")[2]
        kinds.append(f"{'list of ' if 'items' in schema else ''}`{name or media_type}`")
    return f"{status} {_listed(kinds, 'or')}".strip()


def _listed(words: Iterable[str], last: str = "and") -> str:
    *most, final = [*words] or [""]
    return f"{', '.join(most)} {last} {final}" if most else final


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) or not text else f"{text}."
