"""Answers in OpenAI's forms, whole and in pieces, made from the events of our own API. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvservice.v1 import common_pb2

Json = dict[str, object]

_FINISH_REASONS = {
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_EOS: "stop",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_CANCELLED: "stop",
}


@dataclass(frozen=True, slots=True)
class Heading:
    """What every piece of one answer says."""

    answer_id: str
    created: int
    model: str
    is_chat: bool

    def whole(self, choices: list[Json]) -> Json:
        """An answer in one piece."""
        return self._with("chat.completion" if self.is_chat else "text_completion", choices)

    def chunk(self, choices: list[Json]) -> Json:
        """A piece of a stream."""
        return self._with("chat.completion.chunk" if self.is_chat else "text_completion", choices)

    def _with(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)


class WholeAnswer:
    """Gathers the events of one answer."""

    def __init__(self, heading: Heading, num_answers: int) -> None:
        self._heading = heading
        self._choices = [_Choice() for _ in range(num_answers)]
        self._started = common_pb2.Started()

    def take(self, event: common_pb2.GenerateEvent) -> Json | None:
        """Takes an event in; gives the whole answer at the last one."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
        elif kind == "tokens":
            choice = self._choices[event.tokens.index]
            choice.text.append(event.tokens.text)
            choice.logprobs.extend(event.tokens.logprobs)
        elif kind == "finished":
            reasons = finish_reasons(event.finished, len(self._choices))
            choices = [self._choice(index, reason) for index, reason in enumerate(reasons)]
            return {
                **self._heading.whole(choices),
                "usage": usage(event.finished.usage),
                "kvservice": particulars(self._started, event.finished),
            }
        return None

    def _choice(self, index: int, reason: str) -> Json:
        choice = self._choices[index]
        text = "".join(choice.text)
        logprobs = _logprobs(choice.logprobs, is_chat=self._heading.is_chat) if choice.logprobs else None
        content: Json = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._heading.is_chat
            else {"text": text}
        )
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


class StreamedAnswer:
    """Turns each event of an answer into the pieces that a stream tells it by."""

    def __init__(self, heading: Heading, num_answers: int, *, includes_usage: bool) -> None:
        self._heading = heading
        self._num_answers = num_answers
        self._includes_usage = includes_usage
        self._started = common_pb2.Started()

    def take(self, event: common_pb2.GenerateEvent) -> list[Json]:
        """The pieces of an event."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
            return self._openings()
        if kind == "tokens":
            return self._tokens(event.tokens)
        if kind == "finished":
            return self._endings(event.finished)
        return []

    def _openings(self) -> list[Json]:
        if not self._heading.is_chat:
            return []
        return [self._piece(index, {"role": "assistant", "content": ""}) for index in range(self._num_answers)]

    def _tokens(self, tokens: common_pb2.TokenChunk) -> list[Json]:
        # A token in the middle of a character has no text yet.
        if not tokens.text and not tokens.logprobs:
            return []
        return [self._piece(tokens.index, {"content": tokens.text}, tokens.logprobs)]

    def _endings(self, finished: common_pb2.Finished) -> list[Json]:
        pieces = [
            self._piece(index, {}, reason=reason)
            for index, reason in enumerate(finish_reasons(finished, self._num_answers))
        ]
        pieces[-1]["kvservice"] = particulars(self._started, finished)
        if self._includes_usage:
            pieces.append({**self._heading.chunk([]), "usage": usage(finished.usage)})
        return pieces

    def _piece(
        self,
        index: int,
        delta: Json,
        logprobs: Iterable[common_pb2.TokenLogprobs] = (),
        reason: str | None = None,
    ) -> Json:
        told = list(logprobs)
        is_chat = self._heading.is_chat
        content: Json = {"delta": delta} if is_chat else {"text": delta.get("content", "")}
        choice: Json = {
            "index": index,
            **content,
            "logprobs": _logprobs(told, is_chat=is_chat) if told else None,
            "finish_reason": reason,
        }
        return self._heading.chunk([choice])


def usage(message: common_pb2.Usage) -> Json:
    """OpenAI counts what was cached among the prompt's tokens."""
    prompt = message.cached_tokens + message.recomputed_tokens + message.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": message.completion_tokens,
        "total_tokens": prompt + message.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": message.cached_tokens + message.reused_tokens},
    }


def particulars(started: common_pb2.Started, finished: common_pb2.Finished) -> Json:
    """What our own API says of an answer and OpenAI's has no place for."""
    return {
        "session": started.session_id or None,
        "recipe": started.recipe,
        "seed": started.seed,
        "num_tokens": finished.num_tokens,
        "durable_tokens": finished.durable_tokens,
        "recomputed_tokens": finished.usage.recomputed_tokens,
        "ttft_ms": round(finished.timings.ttft_ms, 3),
        "total_ms": round(finished.timings.total_ms, 3),
    }


def finish_reasons(finished: common_pb2.Finished, num_answers: int) -> list[str]:
    """Why each answer ended."""
    told = list(finished.finish_reasons) or [finished.finish_reason] * num_answers
    return [_FINISH_REASONS[reason] for reason in told]


def _logprobs(told: list[common_pb2.TokenLogprobs], *, is_chat: bool) -> Json:
    """Tokens go by their ids, as `token_id:ID`: some are only a part of a character, and have no text."""
    if is_chat:
        return {
            "content": [
                {**_chat_logprob(each.chosen), "top_logprobs": [_chat_logprob(top) for top in each.top]}
                for each in told
            ],
            "refusal": None,
        }
    return {
        "tokens": [_name(each.chosen) for each in told],
        "token_logprobs": [each.chosen.logprob for each in told],
        "top_logprobs": [{_name(top): top.logprob for top in each.top} for each in told],
        "text_offset": [],
    }


def _chat_logprob(told: common_pb2.TokenLogprob) -> Json:
    return {"token": _name(told), "logprob": told.logprob, "bytes": None}


def _name(told: common_pb2.TokenLogprob) -> str:
    return f"token_id:{told.token_id}"
