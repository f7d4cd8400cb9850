"""What the fuzzer feeds: everything of ours that reads bytes which somebody else may have written.

frames      as a tier gives them: whatever isn't, byte for byte, what was written is refused
sealed      the same with a checksum that is right, so that the header's own checks are reached
replies     a Redis server's answers to GETs, as the reader of frames takes them from its socket
manifests   as the state store gives them
messages    every public and internal message, and what the service makes of it
maps, keys  files that an operator names
documents   what callers upload
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import xxhash
from google.protobuf.message import DecodeError, Message

from kvservice.compression.sharing_map import FORMAT, ModelFacts, read_map
from kvservice.config.api_keys import load_api_keys
from kvservice.config.limits import Limits
from kvservice.config.recipes import RECIPES
from kvservice.drill.fuzz import FalseAcceptanceError, Target
from kvservice.drill.fuzz_documents import document_target
from kvservice.drill.fuzz_settings import more_targets
from kvservice.errors import CorruptFrame, InternalError, KVServiceError, Unavailable
from kvservice.gateway import convert as public
from kvservice.internal.v1 import worker_pb2
from kvservice.store.manifests import Chunk, FrameTable, Manifest, pack_manifest, unpack_manifest
from kvservice.tier import codecs
from kvservice.tier.base import OpenSocket
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.tier.stream import ValueStream
from kvservice.tier.wire import CHECKSUM, decode_frame, encode_frame
from kvservice.types import CallId, ModelInfo, ModelShape, SessionId, TenantId
from kvservice.v1 import admin_pb2, common_pb2, inference_pb2, sessions_pb2
from kvservice.worker import convert as internal

ACCEPTED = "accepted"
MAX_RAW_BYTES = 1 << 20
"""Of a frame that is decoded here: larger ones are made by the fuzzer's own doing."""
REPLY_S = 0.05

_HEADERS = (
    FrameHeader(bytes(16), SessionId("s"), bytes(32), 3, FrameRole.KV, bytes(16), 16, 80, (1, 64, 2, 2), "float16"),
    FrameHeader(b"t" * 16, SessionId("S-1_x"), b"f" * 8, 0, FrameRole.SHARED_KEY, b"c" * 16, 0, 64, (256,), "uint8"),
    FrameHeader(
        b"u" * 16, SessionId("z"), b"g" * 64, 29, FrameRole.KV, b"d" * 16, 16, 336, (2, 1, 64, 2, 4), "bfloat16", "zstd"
    ),
    FrameHeader(
        b"u" * 16,
        SessionId("z"),
        b"g" * 64,
        29,
        FrameRole.KV,
        b"e" * 16,
        16,
        80,
        (2, 1, 64, 2, 4),
        "bfloat16",
        "values8",
    ),
)


def targets(folder: Path) -> tuple[Target, ...]:
    """All targets. Files that a parser wants by name are written into `folder`."""
    frames = _frames()
    keys = {frame: header.key for header, frame in zip(_HEADERS, frames, strict=True)}
    tier = ("kvservice/tier/",)
    return (
        Target("frames", frames, lambda data: _frame(data, keys), tier),
        Target("sealed", frames, _sealed_frame, tier, _seal),
        Target("replies", _replies(frames[1]), _reply, ("kvservice/tier/stream",)),
        Target("manifests", _manifests(), _manifest, ("kvservice/store/manifests",)),
        Target(
            "messages", _messages(), _message, ("kvservice/gateway/convert", "kvservice/worker/convert", "internal/")
        ),
        Target("maps", _maps(), _file_target(folder / "map.json", _read_map), ("kvservice/compression/",)),
        Target("keys", _key_files(), _file_target(folder / "keys.json", load_api_keys), ("kvservice/config/",)),
        *more_targets(folder),
        document_target(folder),
    )


def _frames() -> list[bytes]:
    frames = []
    for header in _HEADERS:
        payload = bytes(index * 7 % 251 for index in range(header.raw_bytes))
        size = header.raw_bytes // header.shape[0]
        pieces = [memoryview(payload)[start : start + size] for start in range(0, len(payload), size)]
        frames.append(bytes(encode_frame(header, codecs.encode(header, pieces))))
    return frames


def _frame(data: bytes, keys: dict[bytes, bytes]) -> str:
    """Whatever key it is read under, nothing but what was written under it is taken."""
    verdict = ""
    for frame, key in keys.items():
        try:
            decode_frame(key, data)
        except CorruptFrame as error:
            verdict = verdict or f"refused: {error.reason}"
            continue
        if data != frame:
            raise FalseAcceptanceError(f"{len(data)} bytes under {key!r}")
        verdict = ACCEPTED
    return verdict


def _seal(data: bytes) -> bytes:
    body = data[: -CHECKSUM.size] if len(data) > CHECKSUM.size else data
    return body + CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def _sealed_frame(data: bytes) -> str:
    verdict = ""
    for wanted in _HEADERS:
        try:
            header, stored = decode_frame(wanted.key, data)
        except CorruptFrame as error:
            verdict = verdict or f"refused: {error.reason}"
            continue
        if header.key != wanted.key:
            raise FalseAcceptanceError(f"{header.key!r} under {wanted.key!r}")
        if header.codec not in codecs.CODECS or header.raw_bytes > MAX_RAW_BYTES:
            return "refused: codec"
        pieces = header.shape[0] if header.shape else 1
        try:
            memory = memoryview(bytearray(header.raw_bytes))
            size = header.raw_bytes // pieces if pieces else 0
            codecs.decode(header, stored, [memory[start * size : (start + 1) * size] for start in range(pieces)])
        except CorruptFrame as error:
            return f"refused: {error.reason} of the payload"
        return ACCEPTED
    return verdict


def _replies(frame: bytes) -> list[bytes]:
    value = b"$%d\r\n%b\r\n" % (len(frame), frame)
    return [value + b"$-1\r\n" + value, b"$-1\r\n" * 4, b"-ERR no\r\n", b"-MOVED 3 127.0.0.1:1\r\n", b"_\r\n" + value]


def _reply(data: bytes) -> str:
    """Reads four values, as long as they come."""
    ours, theirs = socket.socketpair()
    stream = ValueStream(OpenSocket(ours, ours.close))
    until = time.monotonic() + REPLY_S
    try:
        theirs.setblocking(False)
        theirs.send(data[:MAX_RAW_BYTES])
        theirs.shutdown(socket.SHUT_WR)
        found = []
        for _ in range(4):
            length = stream.length(lambda: until)
            if length is None:
                found.append("none")
                continue
            stream.skip(length, lambda: until)
            stream.end(lambda: until)
            found.append("value")
        return f"accepted: {', '.join(found)}"
    except Unavailable:
        return "refused: by the server"
    except TimeoutError:
        return "refused: late"
    except OSError as error:
        return f"refused: {type(error).__name__}"
    finally:
        stream.close()
        theirs.close()


def _manifests() -> list[bytes]:
    chunks = tuple(Chunk(16 + 64 * i, 80 + 64 * i, bytes([i]) * 16, SessionId("home"), (4096, 5000)) for i in range(3))
    table = FrameTable(((0, "kv"), (1, "kv")), chunks)
    manifest = Manifest(SessionId("s"), TenantId("t"), bytes(16), bytes(32), 3, 4, 300, 208, table)
    return [
        pack_manifest(manifest),
        pack_manifest(Manifest(SessionId("s"), TenantId("t"), bytes(16), b"", 1, 1, 0, 0, FrameTable())),
    ]


def _manifest(data: bytes) -> str:
    try:
        manifest = unpack_manifest(data)
    except InternalError as error:
        return f"refused: {error.reason}"
    if unpack_manifest(pack_manifest(manifest)) != manifest:
        raise FalseAcceptanceError("a manifest that isn't itself when it is written again")
    return ACCEPTED


_KINDS: tuple[type[Message], ...] = (
    sessions_pb2.CreateRequest,
    sessions_pb2.AppendRequest,
    sessions_pb2.SessionServiceGenerateRequest,
    sessions_pb2.TruncateRequest,
    sessions_pb2.ListRequest,
    inference_pb2.InferenceServiceGenerateRequest,
    inference_pb2.CountTokensRequest,
    admin_pb2.SetQuotaRequest,
    admin_pb2.DrainRequest,
    worker_pb2.ConnectRequest,
    worker_pb2.ConnectResponse,
)


def _messages() -> list[bytes]:
    """The first byte says which kind it is."""
    sampling = common_pb2.SamplingParams(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop=["a", "bc"])
    create = sessions_pb2.CreateRequest(request_id="r", recipe="recall")
    create.ttl.FromSeconds(300)
    drain = admin_pb2.DrainRequest(worker_id="a")
    drain.grace.FromSeconds(3)
    submit = worker_pb2.Submit(call_id="c", session_id="s", recipe="recall", base_token_ids=[1, 2, 300], tenant="t")
    submit.generate.prompt_token_ids.extend([4, 5])
    submit.generate.sampling.CopyFrom(sampling)
    of_kind: dict[type[Message], Message] = {
        sessions_pb2.CreateRequest: create,
        sessions_pb2.AppendRequest: sessions_pb2.AppendRequest(data=b"document"),
        sessions_pb2.SessionServiceGenerateRequest: sessions_pb2.SessionServiceGenerateRequest(
            session_id="s", prompt="why?", sampling=sampling
        ),
        inference_pb2.InferenceServiceGenerateRequest: inference_pb2.InferenceServiceGenerateRequest(
            document="d", prompt_token_ids=[1, 2], sampling=sampling
        ),
        admin_pb2.SetQuotaRequest: admin_pb2.SetQuotaRequest(tenant="t", tokens_per_minute=5.0),
        admin_pb2.DrainRequest: drain,
        worker_pb2.ConnectRequest: worker_pb2.ConnectRequest(submit=submit),
    }
    return [
        bytes([index]) + of_kind.get(kind, kind()).SerializeToString(deterministic=True)
        for index, kind in enumerate(_KINDS)
    ]


_LIMITS = Limits()
_SHAPE = ModelShape(2, 4, 2, 16, 64, 128, 256, 2048, 4)
_MODEL = ModelInfo("tiny", _SHAPE, tuple(RECIPES), "recall", "random weights")


def _message(data: bytes) -> str:
    kind = _KINDS[data[0] % len(_KINDS)] if data else _KINDS[0]
    message = kind()
    try:
        message.ParseFromString(data[1:])
    except DecodeError:
        return "refused: not a message"
    try:
        _use(message)
    except KVServiceError as error:
        return f"refused: {error.status} {error.reason}"
    return f"accepted: {kind.DESCRIPTOR.name}"


def _use(message: Message) -> None:
    """What the service does with a message before it believes it."""
    match message:
        case sessions_pb2.CreateRequest():
            public.request_id(message.request_id, _LIMITS)
            public.ttl_s(message, _LIMITS)
            public.prompt_format(message.prompt_format)
            public.on_miss(message.on_miss)
        case sessions_pb2.AppendRequest():
            public.document_text(message.data)
            public.token_ids(message.token_ids.token_ids, _SHAPE.vocab_size, "token_ids")
        case sessions_pb2.SessionServiceGenerateRequest() | inference_pb2.InferenceServiceGenerateRequest():
            params = public.sampling(message.sampling, _LIMITS, seed=1)
            public.check_vocabulary(params, _SHAPE.vocab_size)
            public.priority(message.priority)
            public.token_ids(message.prompt_token_ids, _SHAPE.vocab_size, "prompt_token_ids")
        case admin_pb2.DrainRequest():
            public.grace_s(message.grace)
        case worker_pb2.ConnectRequest():
            if message.WhichOneof("command") == "submit":
                internal.engine_call(message.submit, CallId(message.submit.call_id), _MODEL, 0.0)


_FACTS = ModelFacts(
    name="small",
    origin="a test",
    weights_digest="ab12",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    qk_norm=False,
)


def _maps() -> list[bytes]:
    """Whole ones are in the kept corpus."""
    return [json.dumps({"format": FORMAT, "version": 1, "checksum": "0"}).encode(), b"{}"]


def _read_map(path: Path) -> object:
    return read_map(path, _FACTS)


def _key_files() -> list[bytes]:
    key = {"sha256": "0" * 64, "tenant": "acme", "role": "tenant", "id": "k", "expires_at": "2027-01-31T00:00:00Z"}
    return [json.dumps({"keys": [key]}).encode(), json.dumps({"keys": [{"sha256": "f" * 64, "tenant": "b"}]}).encode()]


def _file_target(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], str]:
    def feed(data: bytes) -> str:
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            read(path)
        except KVServiceError as error:
            return f"refused: {error.reason or error.status}"
        return ACCEPTED

    return feed
