"""Append: a document is uploaded, tokenised, and read by a worker. Knows nothing of generation."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvservice.config.limits import Limits
from kvservice.config.recipes import get_recipe
from kvservice.errors import DeadlineExceeded, InvalidRequest, LimitExceeded
from kvservice.gateway import convert
from kvservice.gateway.admission import Admission
from kvservice.gateway.auth import Caller
from kvservice.gateway.dispatch import Order, Outcome, Stopwatch, carry_out, check_positions
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.placement import PlacementRequest
from kvservice.gateway.quotas import Account, Quotas
from kvservice.gateway.repeats import Repeats, digest
from kvservice.gateway.runs import Run, Runs
from kvservice.gateway.sessions import Activity, Sessions, refuse_lost_answer
from kvservice.internal.prefixes import lengths_by_name
from kvservice.internal.v1 import worker_pb2
from kvservice.store.base import SessionRecord
from kvservice.types import ModelInfo, TextRole
from kvservice.v1 import sessions_pb2


@dataclass(frozen=True, slots=True)
class Upload:
    """A document as it was sent: text, or token ids."""

    start: sessions_pb2.AppendStart
    text: str | None
    token_ids: tuple[int, ...]

    @property
    def digest(self) -> bytes:
        """Stands for all of it."""
        content = array("Q", self.token_ids).tobytes() if self.text is None else self.text.encode()
        return digest("append", self.start, b"ids" if self.text is None else b"text", content)


async def collect(requests: AsyncIterator[sessions_pb2.AppendRequest], limits: Limits) -> Upload:
    """Receives a document up to the limits.

    Raises:
        InvalidRequest: no start, no content, text and token ids mixed, or not UTF-8.
        LimitExceeded: more than an Append may hold.
        DeadlineExceeded: the caller stopped sending.
    """
    start: sessions_pb2.AppendStart | None = None
    data, ids = bytearray(), array("Q")
    while (request := await _next(requests, limits)) is not None:
        part = request.WhichOneof("part")
        if (part == "start") != (start is None):
            raise InvalidRequest("an Append is one message with `start`, then `data` or `token_ids`", field="part")
        if part == "start":
            start = request.start
            convert.request_id(start.request_id, limits)
            convert.priority(start.priority)
        elif part == "data":
            data += request.data
        elif part == "token_ids":
            ids.extend(request.token_ids.token_ids)
        _check_size(data, ids, limits)
    if start is None:
        raise InvalidRequest("the stream ended before its first message: send `start`, then the document", field="part")
    if not data and not ids:
        raise InvalidRequest("the document is empty: send `data` or `token_ids` after `start`", field="data")
    return Upload(start, convert.document_text(bytes(data)) if data else None, tuple(ids))


async def _next(
    requests: AsyncIterator[sessions_pb2.AppendRequest], limits: Limits
) -> sessions_pb2.AppendRequest | None:
    try:
        async with asyncio.timeout(limits.upload_idle_s):
            return await anext(requests)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise DeadlineExceeded(
            f"nothing came for {limits.upload_idle_s:g} s: send the document and end the sending side of the stream"
        ) from None


def _check_size(data: bytearray, ids: array[int], limits: Limits) -> None:
    if data and ids:
        raise InvalidRequest("an Append holds `data` or `token_ids`, not both", field="part")
    if len(data) > limits.document_bytes:
        raise LimitExceeded(
            f"the document has more than {limits.document_bytes} bytes: split it into several Appends", field="data"
        )
    _check_num_tokens(len(ids), limits)


def _check_num_tokens(num_tokens: int, limits: Limits) -> None:
    if num_tokens > limits.document_tokens:
        raise LimitExceeded(
            f"the document has {num_tokens} tokens: one Append takes {limits.document_tokens}, split it into several",
            field="data",
        )


class Appends:
    """Carries out Appends."""

    def __init__(
        self,
        sessions: Sessions,
        fleet: Fleet,
        admission: Admission,
        runs: Runs,
        repeats: Repeats,
        limits: Limits,
        *,
        quotas: Quotas,
    ) -> None:
        self._sessions = sessions
        self._fleet = fleet
        self._admission = admission
        self._runs = runs
        self._repeats = repeats
        self._limits = limits
        self._quotas = quotas

    def append(self, caller: Caller, upload: Upload, watch: Stopwatch) -> Run[sessions_pb2.AppendResponse]:
        """Begins to read an uploaded document into its session."""
        start = upload.start

        async def body(run: Run[sessions_pb2.AppendResponse]) -> None:
            async with self._repeats.claim(caller.tenant, start.request_id, upload.digest) as claim:
                if claim.kept is not None:
                    final = sessions_pb2.AppendResponse.FromString(claim.kept[0])
                else:
                    async with self._quotas.call(caller.tenant, start.request_id, start.session_id) as account:
                        final = await self._append(run, caller, upload, watch, account)
                        account.finished(final.finished.usage, final.finished.timings)
                    claim.keep([final])
            # Only now is the session free for the next call.
            run.emit(final)

        return self._runs.start(body, detached=start.detach)

    async def _append(
        self,
        run: Run[sessions_pb2.AppendResponse],
        caller: Caller,
        upload: Upload,
        watch: Stopwatch,
        account: Account,
    ) -> sessions_pb2.AppendResponse:
        start = upload.start
        activity = Activity(sessions_pb2.SESSION_STATE_APPENDING)
        expected = start.expected_num_tokens if start.HasField("expected_num_tokens") else None
        async with self._sessions.changing(run, caller, start.session_id, activity, expected) as record:
            refuse_lost_answer(record, start.request_id)
            with run.cancellable():
                outcome = await self._read(run, record, upload, activity, watch, account)
                account.carried_out(outcome)
            record = await self._sessions.commit(record, outcome, start.request_id, is_document=True)
        finished = sessions_pb2.AppendFinished(
            num_tokens=len(record.token_ids),
            durable_tokens=record.durable_tokens,
            usage=outcome.done.usage,
            timings=watch.timings(outcome.done),
            kv=outcome.done.kv,
        )
        return sessions_pb2.AppendResponse(finished=finished)

    async def _read(
        self,
        run: Run[sessions_pb2.AppendResponse],
        record: SessionRecord,
        upload: Upload,
        activity: Activity,
        watch: Stopwatch,
        account: Account,
    ) -> Outcome:
        """Has a worker read the document."""
        model = self._fleet.model(record.model)
        token_ids = await self._tokens(record, upload, model)
        account.check_document(len(token_ids))
        num_tokens = len(record.token_ids) + len(token_ids)
        check_positions(model, held=len(record.token_ids), added=len(token_ids), max_new_tokens=0)

        def show(done_tokens: int, total_tokens: int) -> None:
            activity.done_tokens, activity.total_tokens = done_tokens, total_tokens
            account.read_tokens = done_tokens
            progress = sessions_pb2.AppendProgress(done_tokens=done_tokens, total_tokens=total_tokens)
            run.emit(sessions_pb2.AppendResponse(progress=progress))

        def on_event(event: worker_pb2.CallEvent) -> None:
            # A second worker, where the first was lost, begins anew: callers are told once it is further.
            if event.WhichOneof("event") == "progress" and event.progress.done_tokens > activity.done_tokens:
                show(event.progress.done_tokens, event.progress.total_tokens)

        show(0, len(token_ids))
        submit = self._sessions.submission(record, record.recipe)
        submit.append.token_ids.extend(token_ids)
        submit.priority = upload.start.priority
        account.put_terms(submit)
        order = Order(
            request=PlacementRequest(
                record.model,
                get_recipe(record.recipe),
                num_tokens,
                record.worker_id,
                record.worker_epoch,
                base_tokens=len(record.token_ids),
                given_tokens=num_tokens,
                prefixes=lengths_by_name(submit.tenant_tag, record.recipe, (*record.token_ids, *token_ids)),
            ),
            submit=submit,
            on_admitted=lambda _: None,
            on_event=on_event,
            # What is detached outlives the caller's patience.
            deadline=None if upload.start.detach else watch.deadline,
        )
        return await carry_out(self._admission, order, watch)

    async def _tokens(self, record: SessionRecord, upload: Upload, model: ModelInfo) -> tuple[int, ...]:
        if upload.text is None:
            return convert.token_ids(upload.token_ids, model.shape.vocab_size, "token_ids")
        ids = await self._fleet.tokenize(
            record.model, upload.text, TextRole.DOCUMENT, record.prompt_format, first=not record.token_ids
        )
        _check_num_tokens(len(ids), self._limits)
        if not ids:
            raise InvalidRequest("the document holds no token: send some text", field="data")
        return tuple(ids)
