"""`/v1/models`: the names under which this replica answers."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from octavo_server.json_response import JsonResponse
from octavo_server.openai.response_types import ModelCard, ModelList
from octavo_server.replica import Replica
from octavo_server.served_model import ServedModel


def router(replica: Replica) -> APIRouter:
    """List and look up."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models")
    async def list_models() -> Response:
        """Every name this replica serves, and the adapters that are loaded."""
        served = replica.served
        names = [*served.names, *served.adapters()]
        return JsonResponse(ModelList(data=[_card(served, name) for name in names]))

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        """One name."""
        served = replica.served
        return JsonResponse(_card(served, served.check_name(model_id)))

    return routes


def _card(served: ServedModel, name: str) -> ModelCard:
    adapter = served.adapter_of(name)
    return ModelCard(
        id=name,
        created=served.created,
        root=adapter or served.name,
        parent=served.name if adapter else None,
        max_model_len=served.info.max_model_len,
    )
