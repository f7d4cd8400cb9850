"""Generate, with a session and without: the question goes to a worker, the answer's events are numbered and relayed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from kvservice.config.gateway import GatewayConfig
from kvservice.errors import FailedPrecondition, InvalidRequest, Unavailable
from kvservice.gateway import convert
from kvservice.gateway.admission import Admission
from kvservice.gateway.auth import Caller
from kvservice.gateway.catalogue import choose_model, choose_recipe, override_recipe
from kvservice.gateway.dispatch import Order, Outcome, Stopwatch, carry_out, check_positions
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.placement import PlacementRequest, WorkerView
from kvservice.gateway.quotas import Account, Quotas
from kvservice.gateway.repeats import Repeats, digest
from kvservice.gateway.runs import Run, Runs
from kvservice.gateway.sessions import Activity, Sessions, refuse_lost_answer
from kvservice.internal.convert import sampling_to_proto
from kvservice.internal.prefixes import lengths_by_name
from kvservice.internal.seen import SeenDigest
from kvservice.internal.v1 import worker_pb2
from kvservice.store.base import SessionRecord
from kvservice.types import ModelInfo, PromptFormat, RecipeSpec, SamplingParams, TextRole
from kvservice.v1 import common_pb2, inference_pb2, sessions_pb2


class EventLog:
    """The events of one answer, numbered from 1. Those up to `after` the caller has already.

    `account` is told of what has been computed, so that an answer that is cut short is paid too. `seen` is the digest
    of what the caller has (`internal.seen`); empty: it isn't compared.
    """

    def __init__(self, run: Run[common_pb2.GenerateEvent], after: int, seen: bytes = b"") -> None:
        self.events: list[common_pb2.GenerateEvent] = []
        self.account: Account | None = None
        self._run = run
        self._after = after
        self._seen = seen
        self._digest = SeenDigest()

    @property
    def has_tokens(self) -> bool:
        """Whether the caller has been sent any."""
        return len(self.events) > 1

    def started(self, session_id: str, worker: WorkerView, plan: Plan) -> None:
        """The first event; the caller hears of one worker, the first that took the call."""
        if self.events:
            return
        if self.account is not None:
            self.account.read_tokens += len(plan.document) + len(plan.prompt)
        started = common_pb2.Started(
            session_id=session_id, worker_id=worker.worker_id, recipe=plan.recipe.name, seed=plan.sampling.seed
        )
        self._add(common_pb2.GenerateEvent(started=started))

    def relay(self, event: worker_pb2.CallEvent) -> None:
        """Passes tokens on. Progress of the prefill is no event of an answer.

        Raises:
            FailedPrecondition: the answer has begun otherwise than what the caller has of it.
        """
        if event.WhichOneof("event") == "tokens":
            if self.account is not None:
                self.account.answered_tokens += len(event.tokens.token_ids)
            self._add(common_pb2.GenerateEvent(tokens=event.tokens))

    def check_seen(self) -> None:
        """Refuses to go on from an answer that isn't the one the caller has the beginning of.

        It is computed again, and a machine that computes other calls beside it may round otherwise.

        Raises:
            FailedPrecondition: it isn't.
        """
        if len(self.events) < self._after or (self._after and self._seen and self._digest.value() != self._seen):
            raise FailedPrecondition(
                f"the call failed, and its answer is another one now than the {self._after} events that were sent of "
                "it: ask again with last_sequence 0",
                reason="not_resumable",
            )

    def finished(self, finished: common_pb2.Finished) -> None:
        """The last event; it is held back until `flush`."""
        self.events.append(common_pb2.GenerateEvent(sequence=len(self.events) + 1, finished=finished))

    def flush(self) -> None:
        """Sends the last event."""
        self._send(self.events[-1])

    def replay(self, kept: tuple[bytes, ...]) -> None:
        """Takes an answer that was given before; `flush` sends its last event."""
        self.events = [common_pb2.GenerateEvent.FromString(message) for message in kept]
        for event in self.events[:-1]:
            self._send(event)
        self.check_seen()

    def check_document(self, num_tokens: int) -> None:
        """See `Account.check_document`."""
        if self.account is not None:
            self.account.check_document(num_tokens)

    def cut(self, error: Unavailable) -> Unavailable:
        """The error of a stream that ends after some tokens: it says where the stream stands."""
        stands_at = str(len(self.events))
        return Unavailable(
            f"{error.message}; {stands_at} events were sent: make the call again with last_sequence {stands_at}",
            reason=error.reason,
            retry_after_s=error.retry_after_s,
            metadata={**error.metadata, "last_sequence": stands_at},
        )

    def _add(self, event: common_pb2.GenerateEvent) -> None:
        event.sequence = len(self.events) + 1
        self.events.append(event)
        self._send(event)

    def _send(self, event: common_pb2.GenerateEvent) -> None:
        if event.sequence <= self._after:
            self._digest.add(event.tokens.token_ids)
            return
        if event.sequence == self._after + 1:
            self.check_seen()
        self._run.emit(event)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be answered, in tokens, and how."""

    model: ModelInfo
    recipe: RecipeSpec
    document: tuple[int, ...]
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Question:
    """Text, token ids or turns of a conversation: a part of a request."""

    text: str
    token_ids: tuple[int, ...]
    field: str
    messages: tuple[common_pb2.ChatMessage, ...] = ()

    def check(self) -> None:
        """Refuses two at once."""
        if self.text and self.token_ids:
            raise InvalidRequest(f"set `{self.field}` or `{self.field}_token_ids`, not both", field=self.field)
        if self.messages and (self.text or self.token_ids):
            raise InvalidRequest(f"set `{self.field}` or `messages`, not both", field="messages")


class Answers:
    """Carries out both kinds of Generate."""

    def __init__(
        self,
        config: GatewayConfig,
        sessions: Sessions,
        fleet: Fleet,
        admission: Admission,
        runs: Runs,
        repeats: Repeats,
        *,
        quotas: Quotas,
    ) -> None:
        self._quotas = quotas
        self._config = config
        self._limits = config.limits
        self._sessions = sessions
        self._fleet = fleet
        self._admission = admission
        self._runs = runs
        self._repeats = repeats

    # With a session

    def ask(
        self, caller: Caller, request: sessions_pb2.SessionServiceGenerateRequest, watch: Stopwatch
    ) -> Run[common_pb2.GenerateEvent]:
        """Begins to answer a question about a session."""
        request_id = convert.request_id(request.request_id, self._limits)
        # A repeat of a call that failed gets the same seed, so its events go on where the first ones broke off.
        seed = convert.derived_seed(f"{caller.tenant}\0{request_id}") if request_id else secrets.randbits(64)
        sampling = convert.sampling(request.sampling, self._limits, seed=seed)
        convert.priority(request.priority)
        _question(request).check()
        same_whatever_was_seen = sessions_pb2.SessionServiceGenerateRequest()
        same_whatever_was_seen.CopyFrom(request)
        same_whatever_was_seen.ClearField("last_sequence")
        same_whatever_was_seen.ClearField("seen_digest")
        request_digest = digest("generate", same_whatever_was_seen)

        async def body(run: Run[common_pb2.GenerateEvent]) -> None:
            log = EventLog(run, request.last_sequence, request.seen_digest)
            async with self._repeats.claim(caller.tenant, request_id, request_digest) as claim:
                if claim.kept is not None:
                    log.replay(claim.kept)
                elif request.last_sequence and sampling.n > 1:
                    raise FailedPrecondition(
                        f"the call failed, and tokens of its {sampling.n} answers may come in another order now: "
                        "ask again with last_sequence 0",
                        reason="not_resumable",
                    )
                else:
                    async with self._quotas.call(caller.tenant, request_id, request.session_id) as account:
                        log.account = account
                        try:
                            finished = await self._ask(run, caller, request, sampling, log, watch, account=account)
                        except Unavailable as error:
                            raise (log.cut(error) if request_id and log.has_tokens else error) from None
                        account.finished(finished.usage, finished.timings)
                    claim.keep(log.events)
            # Only now is the session free for the next call.
            log.flush()

        return self._runs.start(body)

    async def _ask(
        self,
        run: Run[common_pb2.GenerateEvent],
        caller: Caller,
        request: sessions_pb2.SessionServiceGenerateRequest,
        sampling: SamplingParams,
        log: EventLog,
        watch: Stopwatch,
        *,
        account: Account,
    ) -> common_pb2.Finished:
        activity = Activity(sessions_pb2.SESSION_STATE_GENERATING)
        expected = request.expected_num_tokens if request.HasField("expected_num_tokens") else None
        async with self._sessions.changing(run, caller, request.session_id, activity, expected) as record:
            refuse_lost_answer(record, request.request_id)
            with run.cancellable():
                model = self._fleet.model(record.model)
                recipe = override_recipe(model, record.recipe, request.recipe)
                before, prompt = await self._asked(
                    model, _question(request), record.prompt_format, first=not record.token_ids
                )
                log.check_document(len(before))
                if not prompt and not record.token_ids:
                    raise InvalidRequest("prompt is empty and so is the session: send a prompt", field="prompt")
                added = len(before) + len(prompt)
                sampling = _fitted(model, request.sampling, sampling, len(record.token_ids), added)
                submit = self._sessions.submission(record, recipe.name)
                submit.priority = request.priority
                account.put_terms(submit)
                submit.generate.keep_partial = request.keep_partial
                # At its deadline a worker fails a call; the end of the RPC cancels it, which keeps what is to be kept.
                deadline = None if request.keep_partial else watch.deadline
                order = _order(submit, Plan(model, recipe, before, prompt, sampling), log, record, deadline)
                outcome = await carry_out(self._admission, order, watch)
                account.carried_out(outcome)
                log.check_seen()
            record = await self._sessions.commit(record, outcome, request.request_id)
            finished = _finished(outcome, watch, len(record.token_ids), record.durable_tokens)
            log.finished(finished)
            return finished

    # Without one

    def complete(
        self, caller: Caller, request: inference_pb2.InferenceServiceGenerateRequest, watch: Stopwatch
    ) -> Run[common_pb2.GenerateEvent]:
        """Begins to answer a question about a document that comes with it. Nothing is kept."""
        sampling = convert.sampling(request.sampling, self._limits, seed=secrets.randbits(64))
        priority = convert.priority(request.priority)
        prompt_format = convert.prompt_format(request.prompt_format)
        document = Question(request.document, tuple(request.document_token_ids), "document")
        question = _question(request)
        document.check()
        question.check()

        async def body(run: Run[common_pb2.GenerateEvent]) -> None:
            log = EventLog(run, 0)
            async with self._quotas.call(caller.tenant) as account:
                log.account = account
                with run.cancellable():
                    model = choose_model(self._fleet, request.model, self._config.default_model)
                    recipe = choose_recipe(model, request.recipe, self._config.default_recipe)
                    read = await self._tokens(model, document, TextRole.DOCUMENT, prompt_format, first=True)
                    before, prompt = await self._asked(model, question, prompt_format, first=not read)
                    read = (*read, *before)
                    account.check_document(len(read))
                    if not read and not prompt:
                        raise InvalidRequest("document and prompt are empty: send one of them", field="prompt")
                    fitted = _fitted(model, request.sampling, sampling, 0, len(read) + len(prompt))
                    submit = self._sessionless(caller, recipe, priority)
                    account.put_terms(submit)
                    order = _order(submit, Plan(model, recipe, read, prompt, fitted), log, None, watch.deadline)
                    outcome = await carry_out(self._admission, order, watch)
                    account.carried_out(outcome)
                finished = _finished(outcome, watch, 0, 0)
                account.finished(finished.usage, finished.timings)
            log.finished(finished)
            log.flush()

        return self._runs.start(body)

    def _sessionless(self, caller: Caller, recipe: RecipeSpec, priority: int) -> worker_pb2.Submit:
        call_id = secrets.token_hex(16)
        return worker_pb2.Submit(
            call_id=call_id,
            # No session; the worker still needs a name for the sequence.
            session_id=call_id,
            tenant_tag=self._sessions.tag(caller.tenant),
            recipe=recipe.name,
            retain=False,
            on_miss=common_pb2.ON_MISS_RECOMPUTE,
            priority=priority,
        )

    # Both

    async def _asked(
        self, model: ModelInfo, question: Question, prompt_format: PromptFormat, *, first: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is read before the question, and the question."""
        if not question.messages:
            return (), await self._tokens(model, question, TextRole.QUESTION, prompt_format, first=first)
        if prompt_format is not PromptFormat.CHAT:
            raise InvalidRequest("messages need the prompt format CHAT: this one's is RAW", field="messages")
        return await self._fleet.tokenize_chat(model.name, question.messages, first=first)

    async def _tokens(
        self, model: ModelInfo, question: Question, role: TextRole, prompt_format: PromptFormat, *, first: bool
    ) -> tuple[int, ...]:
        if question.token_ids:
            return convert.token_ids(question.token_ids, model.shape.vocab_size, f"{question.field}_token_ids")
        if not question.text:
            return ()
        return tuple(await self._fleet.tokenize(model.name, question.text, role, prompt_format, first=first))


def _question(
    request: sessions_pb2.SessionServiceGenerateRequest | inference_pb2.InferenceServiceGenerateRequest,
) -> Question:
    return Question(request.prompt, tuple(request.prompt_token_ids), "prompt", tuple(request.messages))


def _order(
    submit: worker_pb2.Submit, plan: Plan, log: EventLog, record: SessionRecord | None, deadline: float | None
) -> Order:
    submit.generate.document_token_ids.extend(plan.document)
    submit.generate.prompt_token_ids.extend(plan.prompt)
    submit.generate.sampling.CopyFrom(sampling_to_proto(plan.sampling))
    base = tuple(submit.base_token_ids)
    given = (*base, *plan.document, *plan.prompt)
    holder, epoch = (record.worker_id, record.worker_epoch) if record is not None else ("", 0)
    session_id = record.session_id if record is not None else ""
    return Order(
        request=PlacementRequest(
            plan.model.name,
            plan.recipe,
            len(given) + plan.sampling.max_new_tokens,
            holder,
            epoch,
            base_tokens=len(base),
            given_tokens=len(given),
            answers=plan.sampling.n,
            prefixes=lengths_by_name(submit.tenant_tag, plan.recipe.name, given),
        ),
        submit=submit,
        on_admitted=lambda worker: log.started(session_id, worker, plan),
        on_event=log.relay,
        deadline=deadline,
    )


def _fitted(
    model: ModelInfo, asked: common_pb2.SamplingParams, sampling: SamplingParams, held: int, added: int
) -> SamplingParams:
    """Checks token ids and length; a caller who asked for no length isn't refused because the default is too long."""
    convert.check_vocabulary(sampling, model.shape.vocab_size)
    room = model.shape.max_positions - held - added
    if not asked.HasField("max_new_tokens") and room >= 1:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    check_positions(model, held=held, added=added, max_new_tokens=sampling.max_new_tokens)
    return sampling


def _finished(outcome: Outcome, watch: Stopwatch, num_tokens: int, durable_tokens: int) -> common_pb2.Finished:
    done = outcome.done
    return common_pb2.Finished(
        finish_reason=done.finish_reasons[0],
        finish_reasons=done.finish_reasons,
        usage=done.usage,
        timings=watch.timings(done),
        kv=done.kv,
        num_tokens=num_tokens,
        durable_tokens=durable_tokens,
    )
