"""A client that knows the service's address and nothing else: it asks gRPC reflection for the messages.

Needs grpcio, grpcio-reflection and protobuf: python reflecting_client.py ADDRESS. With KVSERVICE_API_KEY set, calls
carry it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PACKAGE = "kvservice.v1"


class Reflected:
    """The service, by what it says of itself."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        key = os.environ.get("KVSERVICE_API_KEY")
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        database = ProtoReflectionDescriptorDatabase(channel)
        self.services = sorted(database.get_services())
        self._pool = DescriptorPool(database)

    def message(self, name: str, **fields: Any) -> Any:
        """A message of our package, or of another when the name has dots."""
        full_name = name if "." in name else f"{PACKAGE}.{name}"
        return GetMessageClass(self._pool.FindMessageTypeByName(full_name))(**fields)

    def call(self, service: str, method: str, request: Any, timeout_s: float = 60.0) -> Any:
        """The response, or the responses of a streaming method."""
        found = self._pool.FindServiceByName(f"{PACKAGE}.{service}").FindMethodByName(method)
        kinds = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }
        response = GetMessageClass(found.output_type)
        make: Callable[..., Any] = kinds[found.client_streaming, found.server_streaming]
        stub = make(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return stub(request, timeout=timeout_s, metadata=self._metadata)

    def details(self, error: grpc.RpcError) -> dict[str, Any]:
        """The messages that a service puts into the trailer `grpc-status-details-bin`."""
        from google.rpc import error_details_pb2, status_pb2

        (packed,) = (value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
        found = {}
        for each in status_pb2.Status.FromString(packed).details:
            name = each.TypeName().rpartition(".")[2]
            found[name] = getattr(error_details_pb2, name).FromString(each.value)
        return found


def say(title: str, value: Any) -> None:
    sys.stdout.write(f"{title}: {value if isinstance(value, str) else json.dumps(value)}\n")


def failure(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        if isinstance(result, Iterator):
            list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call should have failed")


def main(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        talk(Reflected(channel))


def talk(service: Reflected) -> None:
    message, call = service.message, service.call
    say("services", [name for name in service.services if name.startswith(PACKAGE)])

    # Session and streaming
    models = call("InferenceService", "ListModels", message("ListModelsRequest"))
    say("models", [model.name for model in models.models])
    session = call("SessionService", "Create", message("CreateRequest", recipe="recall")).session
    say("session", f"recipe {session.recipe}, {session.num_tokens} tokens")

    def document() -> Iterable[Any]:
        yield message("AppendRequest", start=message("AppendStart", session_id=session.session_id))
        yield message("AppendRequest", data=b"The pass key is 28478. " * 40)

    read = [response.finished for response in call("SessionService", "Append", document())][-1]
    say("append", f"{read.num_tokens} tokens")

    def question(prompt: str, **sampling: Any) -> Any:
        return message(
            "SessionServiceGenerateRequest",
            session_id=session.session_id,
            prompt=prompt,
            sampling=message("SamplingParams", **sampling),
        )

    def get() -> Any:
        return call("SessionService", "Get", message("GetRequest", session_id=session.session_id)).session

    def idle() -> int:
        """A session is free as soon as the gateway has noticed that a caller went away."""
        while (now := get()).state != 1:
            time.sleep(0.02)
        return int(now.num_tokens)

    asked = question("Question?", max_new_tokens=6, ignore_eos=True)
    events = [each.event for each in call("SessionService", "Generate", asked)]
    say("events", list(dict.fromkeys(event.WhichOneof("event") for event in events)))
    finished = events[-1].finished
    say("answer", f"{finished.usage.completion_tokens} tokens, cached {finished.usage.cached_tokens}")
    say("held", get().num_tokens)

    # Cancel
    long = question("Go on", max_new_tokens=600, ignore_eos=True)
    stream = call("SessionService", "Generate", long)
    for each in stream:
        if each.event.WhichOneof("event") == "tokens":
            stream.cancel()
            break
    say("cancel", failure(lambda: stream).code().name)
    say("held after the cancel", idle())

    # Deadline
    say("deadline", failure(lambda: call("SessionService", "Generate", long, timeout_s=0.3)).code().name)
    say("held after the deadline", idle())

    # Error details
    unknown = failure(lambda: call("SessionService", "Get", message("GetRequest", session_id="0" * 32)))
    info = service.details(unknown)["ErrorInfo"]
    say(
        "unknown session", f"{unknown.code().name}, {info.domain}/{info.reason}, retryable {info.metadata['retryable']}"
    )
    wrong = failure(lambda: call("SessionService", "Generate", question("Go on", max_new_tokens=0)))
    violation = service.details(wrong)["BadRequest"].field_violations[0]
    say("wrong request", f"{wrong.code().name}, {violation.field}: {violation.description}")

    # And its end
    call("SessionService", "Close", message("CloseRequest", session_id=session.session_id, purge=True))
    say("closed", failure(get).code().name)


if __name__ == "__main__":
    main(sys.argv[1])
