"""What `helm test` runs inside the gateway's image: a health RPC, and one generation."""

import asyncio
import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvservice.client import Client
from kvservice.client.client import collect_answer
from kvservice.internal.tls import PemFiles, channel_credentials


async def check(address: str) -> None:
    """Ends the process with a sentence if anything is wrong."""
    ca = os.environ.get("KVSERVICE_TLS_CA")
    tls = PemFiles(None, None, Path(ca)) if ca else None
    channel = (
        grpc.aio.insecure_channel(address)
        if tls is None
        else grpc.aio.secure_channel(address, channel_credentials(tls))
    )
    async with channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    if health.status != health_pb2.HealthCheckResponse.SERVING:
        sys.exit(f"health: {health_pb2.HealthCheckResponse.ServingStatus.Name(health.status)}")
    async with Client(address, os.environ.get("KVSERVICE_API_KEY"), tls=tls) as client:
        for model in await client.list_models():
            answer = await collect_answer(client.complete("Once upon a time", model=model.name, max_new_tokens=8))
            sys.stdout.write(f"{model.name}: {answer.finished.usage.completion_tokens} tokens\n")


asyncio.run(check(sys.argv[1]))
