"""The socket's messages as an AsyncAPI document, from the models that the server reads and writes."""

from typing import Any, get_args

from pydantic.json_schema import models_json_schema

from adastate_jax import __version__
from adastate_jax.serving import protocol


def asyncapi() -> dict[str, Any]:
    """The document, of AsyncAPI 3.0."""
    incoming, outgoing = (get_args(get_args(kind)[0]) for kind in (protocol.Incoming, protocol.Outgoing))
    _, schemas = models_json_schema(
        [*((model, "validation") for model in incoming), *((model, "serialization") for model in outgoing)],
        ref_template="#/components/schemas/{model}",
    )
    messages = {model.__name__: _message(model) for model in (*incoming, *outgoing)}
    messages["Pictures"] = {
        "title": "Pictures",
        "summary": protocol.pack.__doc__,
        "contentType": "application/octet-stream",
    }

    def references(names):
        return [{"$ref": f"#/channels/session/messages/{name}"} for name in names]

    return {
        "asyncapi": "3.0.0",
        "info": {"title": "adastate live", "version": __version__, "description": protocol.__doc__},
        "channels": {
            "session": {
                "address": "/v1/sessions/{id}",
                "parameters": {"id": {"description": "what POST /v1/sessions answered; its key is ?key=…"}},
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
            }
        },
        "operations": {
            "say": {
                "action": "send",
                "channel": {"$ref": "#/channels/session"},
                "messages": references(model.__name__ for model in incoming),
            },
            "hear": {
                "action": "receive",
                "channel": {"$ref": "#/channels/session"},
                "messages": references([*(model.__name__ for model in outgoing), "Pictures"]),
            },
        },
        "components": {"messages": messages, "schemas": schemas.get("$defs", {})},
    }


def _message(model: type[protocol.Message]) -> dict[str, Any]:
    summary = " ".join((model.__doc__ or model.__name__).split())
    return {
        "title": model.__name__,
        "summary": summary,
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
    }
