"""InferenceService: each RPC calls one named step. Knows gRPC and nothing of how a step works."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from kvservice.gateway import convert
from kvservice.gateway.answers import Answers
from kvservice.gateway.auth import CALLER
from kvservice.gateway.catalogue import choose_model, served_recipes
from kvservice.gateway.dispatch import Stopwatch
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.interceptors import Context
from kvservice.internal.convert import model_to_proto
from kvservice.types import TextRole
from kvservice.v1 import inference_pb2
from kvservice.v1.inference_pb2_grpc import InferenceServiceServicer


class InferenceServicer(InferenceServiceServicer):
    """Generate without a session, ListModels and CountTokens."""

    def __init__(self, answers: Answers, fleet: Fleet, default_model: str) -> None:
        self._answers = answers
        self._fleet = fleet
        self._default_model = default_model

    async def Generate(  # noqa: D102
        self,
        request: inference_pb2.InferenceServiceGenerateRequest,
        context: Context,
    ) -> AsyncIterator[inference_pb2.InferenceServiceGenerateResponse]:
        run = self._answers.complete(CALLER.get(), request, Stopwatch(context.time_remaining()))
        async with aclosing(run.messages()) as events:
            async for event in events:
                yield inference_pb2.InferenceServiceGenerateResponse(event=event)

    async def ListModels(  # noqa: D102
        self,
        request: inference_pb2.ListModelsRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> inference_pb2.ListModelsResponse:
        models = []
        for model in self._fleet.models().values():
            message = model_to_proto(model)
            del message.recipes[:]
            message.recipes.extend(served_recipes(model))
            models.append(message)
        return inference_pb2.ListModelsResponse(models=models)

    async def CountTokens(  # noqa: D102
        self,
        request: inference_pb2.CountTokensRequest,
        context: Context,  # noqa: ARG002
    ) -> inference_pb2.CountTokensResponse:
        model = choose_model(self._fleet, request.model, self._default_model)
        prompt_format = convert.prompt_format(request.prompt_format)
        ids = await self._fleet.tokenize(model.name, request.text, TextRole.DOCUMENT, prompt_format, first=True)
        return inference_pb2.CountTokensResponse(num_tokens=len(ids), max_positions=model.shape.max_positions)
