"""The gRPC endpoint: `inference.GRPCInferenceService` of the Open Inference Protocol."""

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

import cxr
from cxr import context as contexts
from cxr.engine import CONFIG_FILE
from cxr_server import v2
from cxr_server.errors import RequestError, bad_request, without_message
from cxr_server.logs import log_access
from cxr_server.service import Service, check_model, raise_if_all_bad
from cxr_server.settings import address

log = logging.getLogger(__name__)

_PROTOCOL = "grpc"
_SERVICE = "inference.GRPCInferenceService"
# Not the calls that load and unload models, nor Triton's own.
_METHODS = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelInfer",
)
# Trailing metadata of a refusal: the machine-readable reason of the first image.
_REJECTION = "cxr-rejection"
# Triton's extension, for gRPC: what else there is to know of a model.
_EXTENSIONS = (*v2.EXTENSIONS, "model_configuration")

Call = Callable[[Any, Any], Awaitable[Any]]


class InferenceServicer:
    """Answers the calls of the standard. A request is None where its bytes could not be read."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Whether the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Whether the model can answer."""
        return pb.ServerReadyResponse(ready=self._service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Name and version of this software."""
        return pb.ServerMetadataResponse(
            name=v2.SERVER_NAME, version=cxr.__version__, extensions=_EXTENSIONS
        )

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether that model can answer."""

        async def answer() -> Any:
            check_model(self._service, request.name, request.version)
            return pb.ModelReadyResponse(ready=self._service.ready)

        return await self._measured("ready", request, answer, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Inputs and outputs of that model."""

        async def answer() -> Any:
            check_model(self._service, request.name, request.version)
            config = self._service.config
            inputs, outputs = v2.tensor_metadata(config)
            tensor = pb.ModelMetadataResponse.TensorMetadata
            return pb.ModelMetadataResponse(
                name=config.name,
                versions=[config.version],
                platform=v2.PLATFORM,
                inputs=[tensor(**item) for item in inputs],
                outputs=[tensor(**item) for item in outputs],
            )

        return await self._measured("metadata", request, answer, context)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """That model's configuration, model card included, as JSON in a parameter of its name."""

        async def answer() -> Any:
            check_model(self._service, request.name, request.version)
            config = self._service.config
            described = model_config_pb2.ModelConfig(name=config.name, platform=v2.PLATFORM)
            described.parameters[CONFIG_FILE].string_value = config.to_json()
            return pb.ModelConfigResponse(config=described)

        return await self._measured("config", request, answer, context)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answers images."""

        async def answer() -> Any:
            check_model(self._service, request.model_name, request.model_version)
            infer = _parse(request, self._service.settings.max_batch)
            answers = await self._service.predict(infer.images, infer.options)
            raise_if_all_bad(answers)
            tensors = v2.output_tensors(self._service.config, answers, infer.outputs)
            return self._response(infer.id, tensors, raw=bool(request.raw_input_contents))

        return await self._measured("infer", request, answer, context)

    def _response(self, request_id: str, tensors: list[v2.Tensor], *, raw: bool) -> Any:
        """The answer, raw or typed as the request's own data were."""
        response = pb.ModelInferResponse(
            model_name=self._service.config.name,
            model_version=self._service.config.version,
            id=request_id,
        )
        for tensor in tensors:
            output = response.outputs.add(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape
            )
            for key, value in tensor.parameters.items():
                output.parameters[key].string_param = value
            if raw:
                response.raw_output_contents.append(tensor.raw())
            elif tensor.datatype == "BYTES":
                output.contents.bytes_contents.extend(tensor.data.ravel())
            else:
                output.contents.fp32_contents.extend(tensor.data.ravel())
        return response

    async def _measured(
        self, method: str, request: Any, answer: Callable[[], Awaitable[Any]], context: Any
    ) -> Any:
        """Turn failures into a status, and count and time the call."""
        metrics = self._service.metrics
        start = time.perf_counter()
        # What stays when the caller has gone or its deadline has passed: this task is cancelled.
        status, message = grpc.StatusCode.CANCELLED, ""
        trailing: tuple[tuple[str, str], ...] = ()
        response = None
        with metrics.in_flight.track_inprogress():
            try:
                if request is None:
                    raise bad_request("The message is not a valid request of this method.")
                response = await answer()
                status = grpc.StatusCode.OK
            except RequestError as error:
                status, message = error.grpc_status, str(error)
                if error.rejection is not None:
                    trailing = ((_REJECTION, error.rejection.value),)
            except Exception as error:
                log.error("%s: unexpected %s", method, without_message(error))
                status = grpc.StatusCode.INTERNAL
                message = "The service failed; try again later."
            finally:
                seconds = time.perf_counter() - start
                metrics.request(_PROTOCOL, method, status.name, seconds)
                log_access(_PROTOCOL, method, status.name, seconds)
        if status is not grpc.StatusCode.OK:
            await context.abort(status, message, trailing)
        return response


def _parse(request: Any, max_batch: int) -> v2.InferRequest:
    tensors = list(request.inputs)
    first = tensors[0] if tensors else pb.ModelInferRequest.InferInputTensor()
    count = v2.check_input(
        [tensor.name for tensor in tensors], first.datatype, first.shape, max_batch
    )
    raw = request.raw_input_contents
    if raw and (len(raw) > 1 or first.contents.bytes_contents):
        raise bad_request(
            f"Input {v2.INPUT!r} must come in either raw_input_contents or bytes_contents."
        )
    images = v2.unpack_bytes(raw[0], count) if raw else list(first.contents.bytes_contents)
    v2.check_count(images, count)
    outputs = v2.check_outputs([output.name for output in request.outputs])
    return v2.InferRequest(
        id=request.id or str(uuid.uuid4()),
        images=images,
        outputs=outputs,
        options=v2.options(_parameter(request.parameters, v2.EXPLAIN), outputs),
    )


def _parameter(parameters: Any, name: str) -> object:
    """The value of a request's parameter; None if it has none of that name."""
    if name not in parameters:
        return None
    parameter = parameters[name]
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "", None)


def _reader(message: Any) -> Callable[[bytes], Any]:
    """Reads a message, or None: gRPC itself would answer malformed bytes with INTERNAL."""

    def read(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except Exception:  # protobuf's exception types depend on its implementation
            return None

    return read


def _identified(call: Call) -> Call:
    """Give a call its context, and its answer the id."""

    async def identified(request: Any, context: Any) -> Any:
        metadata = dict(context.invocation_metadata())
        entered = contexts.enter(
            metadata.get(contexts.REQUEST_ID, ""), metadata.get(contexts.TRACEPARENT, "")
        )
        await context.send_initial_metadata(((contexts.REQUEST_ID, entered.request_id),))
        return await call(request, context)

    return identified


async def start_grpc(service: Service) -> tuple[Any, int]:
    """Start the gRPC server.

    Returns:
        The server and the port that it listens on.

    Raises:
        RuntimeError: the address cannot be used.
    """
    settings = service.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_age_ms", round(1000 * settings.connection_age)),
            # A call may take as long as a request over REST: to arrive, and to be answered. One
            # that never arrives ends with its connection.
            ("grpc.max_connection_age_grace_ms", round(2000 * settings.request_timeout)),
            # Two services must not answer on one port by turns.
            ("grpc.so_reuseport", 0),
        ]
    )
    servicer = InferenceServicer(service)
    calls: dict[str, Call] = {name: getattr(servicer, name) for name in _METHODS}
    if service.tracing is not None:
        name = "ModelInfer"
        calls[name] = service.tracing.call(f"{_SERVICE}/{name}", calls[name])
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                _SERVICE,
                {
                    name: grpc.unary_unary_rpc_method_handler(
                        _identified(call),
                        request_deserializer=_reader(getattr(pb, f"{name}Request")),
                        response_serializer=getattr(pb, f"{name}Response").SerializeToString,
                    )
                    for name, call in calls.items()
                },
            ),
        )
    )
    port: int = server.add_insecure_port(address(settings.host, settings.grpc_port))
    await server.start()
    return server, port
