"""The description of the API, made from the types of `schemas`."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from atlas_jax import __version__
from atlas_jax.serving import schemas
from atlas_jax.serving.schemas import Sent, Told

_REFERENCE = "#/components/schemas/{model}"
_FAULTS = {
    "400": "A field is at fault; `detail` names it.",
    "401": "The API key is missing or wrong.",
    "403": "This server has no API key, so nothing can be changed.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many questions are waiting; `Retry-After` says for how long.",
    "503": "The server is not ready, or shutting down.",
    "504": "The answer was not there in time.",
}
_ASK_FAULTS = tuple(status for status in _FAULTS if status != "403")
_CHANGE_FAULTS = ("400", "401", "403", "408", "413", "415", "503")
_Route = tuple[str, str, type[Sent] | None, type[Told] | None, tuple[str, ...]]
# Path -> method, what it does, request, reply, the faults beside 401.
ROUTES: dict[str, _Route] = {
    "/v1/passages": ("post", "Add, replace and delete passages, as one version.",
                     schemas.PassagesRequest, schemas.ChangedReply, _CHANGE_FAULTS),
    "/v1/answers": ("post", "Answer one question or several.", schemas.AnswersRequest,
                    schemas.AnswersReply, _ASK_FAULTS),
    "/v1/retrieve": ("post", "Find passages for one question or several.",
                     schemas.RetrieveRequest, schemas.RetrieveReply, _ASK_FAULTS),
    "/v1/passages/{id}": ("get", "One passage of the corpus.", None, schemas.PassageReply,
                          ("404", "503")),
    "/v1/versions": ("get", "The versions of the passages, the newest 100 before `before`.", None,
                     schemas.VersionsReply, ("400", "503")),
    "/v1/models": ("get", "What is served, and its limits.", None, schemas.ModelsReply, ("503",)),
    "/v1/examples": ("get", "Questions to try, and some passages.", None, schemas.ExamplesReply,
                     ("503",)),
    "/healthz": ("get", "Whether the process lives.", None, schemas.StatusReply, ()),
    "/readyz": ("get", "Whether every program is compiled; 503 until then.", None,
                schemas.StatusReply, ("503",)),
    "/metrics": ("get", "Figures in Prometheus' text form.", None, None, ()),
}  # fmt: skip

_DELETE = (
    "Delete one passage.", None, schemas.ChangedReply, ("400", "401", "403", "404", "503"),
)  # fmt: skip


def description() -> dict[str, Any]:
    """The document that /openapi.json serves (OpenAPI 3.1)."""
    paths = {path: {route[0]: _operation(path, *route[1:])} for path, route in ROUTES.items()}
    paths["/v1/passages/{id}"]["delete"] = _operation("/v1/passages/{id}", *_DELETE)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "atlas-jax",
            "version": __version__,
            "description": "Answers with the passages that they were read from.",
        },
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": _components(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _components() -> dict[str, Any]:
    """What every route takes and gives, as JSON Schema."""
    kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [(schemas.Problem, "serialization")]
    for _, _, request, reply, _ in ROUTES.values():
        kinds += [(request, "validation")] if request is not None else []
        kinds += [(reply, "serialization")] if reply is not None else []
    found: dict[str, Any] = models_json_schema(kinds, ref_template=_REFERENCE)[1]["$defs"]
    return found


def _operation(
    path: str,
    summary: str,
    request: type[Sent] | None,
    reply: type[Told] | None,
    faults: tuple[str, ...],
) -> dict[str, Any]:
    made: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done."}}}
    if reply is not None:
        made["responses"]["200"]["content"] = _content("application/json", reply)
    else:
        made["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if request is not None:
        made["requestBody"] = {"required": True, "content": _content("application/json", request)}
    if "{id}" in path:
        made["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if path == "/v1/versions":
        made["parameters"] = [{"name": "before", "in": "query", "schema": {"type": "integer"}}]
    words = {**_FAULTS, "404": "There is none of this id."}
    for status in faults:
        content = _content("application/problem+json", schemas.Problem)
        if path == "/readyz":
            content = _content("application/json", schemas.StatusReply)
        made["responses"][status] = {"description": words[status], "content": content}
    return made


def _content(media: str, kind: type[BaseModel]) -> dict[str, Any]:
    return {media: {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
