"""The page of the server's routes, requests and replies, from the description that it serves."""

from typing import Any

from atlas_jax.serving.openapi import description

INTRODUCTION = """# HTTP API

What `atlas-jax serve` answers, from the same types as its `/openapi.json`.
[Over HTTP and in a browser](../serving.md) explains it.

"""


def page() -> str:
    """The page in Markdown."""
    told = description()
    parts = [INTRODUCTION]
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{operation['summary']}\n\n")
            body = operation.get("requestBody")
            if body:
                parts.append(f"Request: {_kind(_schema(body))}.\n\n")
            for status, reply in operation["responses"].items():
                parts.append(f"- {status}: {reply['description']} {_kind(_schema(reply))}\n")
            parts.append("\n")
    parts.append("## Types\n\n")
    for name, schema in told["components"]["schemas"].items():
        parts.append(f"### {name}\n\n{schema.get('description', '')}\n\n")
        parts.append("| field | type | default | |\n|---|---|---|---|\n")
        required = schema.get("required", [])
        for field, kind in schema.get("properties", {}).items():
            default = "required" if field in required else f"`{kind.get('default')!r}`"
            words = kind.get("description", "")
            parts.append(f"| `{field}` | {_kind(kind)} | {default} | {words} |\n")
        parts.append("\n")
    return "".join(parts)


def _schema(of: dict[str, Any]) -> dict[str, Any]:
    (content,) = of["content"].values()
    found: dict[str, Any] = content["schema"]
    return found


def _kind(schema: dict[str, Any]) -> str:
    """A type in words, with a link if it is one of the page's."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{value!r}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema['items'])}"
    if kind == "object":
        return f"object of {_kind(schema['additionalProperties'])}"
    bounds = [
        f"{sign} {schema[n]}" for n, sign in (("minimum", "≥"), ("maximum", "≤")) if n in schema
    ]
    return " ".join([kind, *bounds])
