"""The v2 protocol over gRPC."""
# ruff: noqa: N802  (names of the protocol)

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from octavo_server.caller import DEADLINE_HEADER, Caller, caller_from
from octavo_server.errors import INTERNAL_ERROR, ApiError
from octavo_server.lifecycle import InFlight
from octavo_server.oip import open_inference_pb2 as pb
from octavo_server.oip.grpc_codec import (
    decode_parameters,
    decode_request,
    encode_config,
    encode_metadata,
    encode_response,
    encode_statistics,
)
from octavo_server.oip.models import InferResponse, with_parameters
from octavo_server.oip.repository import EXTENSIONS, SERVER_NAME, Repository, config, metadata, statistics
from octavo_server.replica import VERSION as SERVER_VERSION
from octavo_server.replica import Replica

SERVICE = "inference.GRPCInferenceService"
# Requests of one stream that may run at a time; the stream is not read further until one of them ends.
_STREAM_CONCURRENCY = 256

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

logger = logging.getLogger("octavo.server")


class InferenceService:
    """One method per call of the protocol."""

    def __init__(self, replica: Replica, repository: Repository) -> None:
        self._replica = replica
        self._repository = repository

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._repository.live)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._repository.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=SERVER_VERSION, extensions=EXTENSIONS)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._repository.model_ready(request.name, request.version))

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        return encode_metadata(metadata(self._repository.find(request.name, request.version)))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        model = self._repository.find(request.name, request.version)
        return pb.ModelConfigResponse(config=encode_config(config(model)))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        found = [self._repository.find(request.name, request.version)] if request.name else self._repository.models
        return pb.ModelStatisticsResponse(model_stats=[encode_statistics(statistics(model)) for model in found])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        entries = self._repository.index(ready_only=request.ready)
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in entries])

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        await self._repository.load(request.model_name, decode_parameters(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Any) -> pb.TraceSettingResponse:
        settings = self._repository.trace_settings({name: list(v.value) for name, v in request.settings.items()})
        response = pb.TraceSettingResponse()
        for name, value in settings.items():
            response.settings[name].value.extend(value if isinstance(value, list) else [value])
        return response

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:
        response = pb.LogSettingsResponse()
        for name, value in self._repository.log_settings(decode_parameters(request.settings)).items():
            if isinstance(value, bool):
                response.settings[name].bool_param = value
            elif isinstance(value, int):
                response.settings[name].uint32_param = value
            else:
                response.settings[name].string_param = value
        return response

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        with self._admitted():
            model = self._repository.find(request.model_name, request.model_version)
            decoded = decode_request(request)
            caller = with_parameters(_caller(context), decoded)
            response = await model.infer_once(decoded, caller)
            return encode_response(request.model_name, model.version, request.id, response)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Many requests share the stream; an error is that request's alone; cancelling the call aborts them all."""
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read_stream(requests, _caller(context), responses))
        try:
            while (response := await responses.get()) is not None:
                yield response
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read_stream(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        caller: Caller,
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None],
    ) -> None:
        """Run every request of the stream; half-close means: finish what is pending."""
        gate = asyncio.Semaphore(_STREAM_CONCURRENCY)

        async def run(request: pb.ModelInferRequest) -> None:
            try:
                await self._stream_one(request, caller, responses)
            finally:
                gate.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await gate.acquire()
                    group.create_task(run(request))
        finally:
            responses.put_nowait(None)

    async def _stream_one(
        self,
        request: pb.ModelInferRequest,
        caller: Caller,
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None],
    ) -> None:
        try:
            with self._admitted():
                model = self._repository.find(request.model_name, request.model_version)
                decoded = decode_request(request)
                wants_empty_final = bool(decoded.parameters.get("triton_enable_empty_final_response"))
                run = model.infer(decoded, with_parameters(caller, decoded))
                async with contextlib.aclosing(run):
                    async for response in run:
                        if wants_empty_final:
                            response = InferResponse(response.outputs, final=False)
                        message = encode_response(
                            request.model_name, model.version, request.id, response, tell_final=True
                        )
                        responses.put_nowait(pb.ModelStreamInferResponse(infer_response=message))
                if wants_empty_final:
                    message = encode_response(
                        request.model_name, model.version, request.id, InferResponse([]), tell_final=True
                    )
                    responses.put_nowait(pb.ModelStreamInferResponse(infer_response=message))
        except ApiError as error:
            self._replica.metrics.rejected(error.reason)
            failed = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            responses.put_nowait(pb.ModelStreamInferResponse(error_message=error.message, infer_response=failed))

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count the request for drains, and let a drain that takes too long end it."""
        in_flight = InFlight(uuid.uuid4().hex)
        task = asyncio.current_task()
        if task is not None:
            in_flight.bind(task)
        self._replica.lifecycle.admit(in_flight)
        try:
            yield
        except asyncio.CancelledError:
            if in_flight.stop_cause is None:
                raise
            raise in_flight.stop_cause from None
        finally:
            self._replica.lifecycle.release(in_flight)


def inference_handler(replica: Replica, repository: Repository) -> grpc.GenericRpcHandler:
    """The service with errors turned into gRPC statuses."""
    service = InferenceService(replica, repository)
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    handlers = {}
    for method in descriptor.methods:
        implementation = getattr(service, method.name)
        request_type = getattr(pb, method.input_type.name)
        wrap, make = (
            (_guarded_stream, grpc.stream_stream_rpc_method_handler)
            if method.client_streaming
            else (_guarded, grpc.unary_unary_rpc_method_handler)
        )
        handlers[method.name] = make(
            wrap(implementation, replica),
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _guarded(method: Callable[[Any, Any], Awaitable[Any]], replica: Replica) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except ApiError as error:
            await _abort(context, error, replica)
        except Exception as error:
            _log(error)
            await _abort(context, ApiError(500, INTERNAL_ERROR), replica)

    return call


def _guarded_stream(
    method: Callable[[Any, Any], AsyncIterator[Any]], replica: Replica
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(requests, context):
                yield response
        except ApiError as error:
            await _abort(context, error, replica)
        except Exception as error:
            _log(error)
            await _abort(context, ApiError(500, INTERNAL_ERROR), replica)

    return call


async def _abort(context: Any, error: ApiError, replica: Replica) -> None:
    replica.metrics.rejected(error.reason)
    trailing = tuple(error.headers().items())
    await context.abort(_STATUS.get(error.status, grpc.StatusCode.INTERNAL), error.message, trailing)


def _log(error: Exception) -> None:
    """Where it happened, not what it says: the message may quote a prompt."""
    frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
    logger.error("gRPC call failed with %s at\n%s", type(error).__name__, frames)


def _caller(context: Any) -> Caller:
    """The gateway's headers arrive as metadata; the call's own deadline counts as well."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    remaining_s = context.time_remaining()
    if DEADLINE_HEADER not in metadata and remaining_s is not None and remaining_s < 10**7:
        metadata[DEADLINE_HEADER] = str(max(1, int(remaining_s * 1_000)))
    return caller_from(metadata)
