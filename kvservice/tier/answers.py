"""Answers of a Redis that are answers to the commands sent: of the kind that each command has, and as many.

Bits that flip on the way, or a connection on which an answer was lost, make a library read what isn't there: a number
for a value, the answer to another command, nothing it can parse. That connection isn't used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

GARBLED = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What the library's own parsers fail with."""

_NUMBERS_OF = {"memory": ("used_memory", "maxmemory"), "stats": ("evicted_keys",)}
"""What is read of INFO's sections."""


class GarbledAnswerError(RedisError):
    """An answer is none to its command."""


async def answers_to(client: Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The answers to `commands` in one round trip; errors of single commands are among them.

    Raises:
        RedisError: the server can't answer, or one of the answers is none to its command.
        OSError: the connection broke.
    """
    try:
        async with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, GARBLED) or not (isinstance(answer, Exception) or _is_answer(command, answer)):
                raise TypeError(f"{type(answer).__name__} to {command[0]}")
    except GARBLED as error:
        # What comes next on the connection may be the answer to this.
        await client.connection_pool.disconnect()
        raise GarbledAnswerError(f"an answer that is none to its command: {error!r}"[:200]) from error
    return answers


def _is_answer(command: tuple[Any, ...], answer: object) -> bool:
    check = _KINDS.get(str(command[0]))
    return check is None or check(command, answer)


def _is_number(_: tuple[Any, ...], answer: object) -> bool:
    return isinstance(answer, int)


def _is_value(_: tuple[Any, ...], answer: object) -> bool:
    return answer is None or isinstance(answer, bytes)


def _are_values(command: tuple[Any, ...], answer: object) -> bool:
    is_list = isinstance(answer, list) and len(answer) == len(command) - 1
    return is_list and all(value is None or isinstance(value, bytes) for value in answer)  # type: ignore[attr-defined]


def _are_members(command: tuple[Any, ...], answer: object) -> bool:
    """Of a set that names the frames of one home: keys of that home, so that nobody else's are deleted with them."""
    home = bytes(command[1]).partition(b":")[2]
    members = answer if isinstance(answer, set | list) else None
    return members is not None and all(
        isinstance(member, bytes) and member.partition(b":")[2].startswith(home) for member in members
    )


def _is_page(_: tuple[Any, ...], answer: object) -> bool:
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return False
    cursor, keys = answer
    return isinstance(cursor, int) and isinstance(keys, list) and all(isinstance(key, bytes) for key in keys)


def _is_table(command: tuple[Any, ...], answer: object) -> bool:
    names = _NUMBERS_OF.get(str(command[1]), ())
    return isinstance(answer, dict) and all(isinstance(answer.get(name), int) for name in names)


_KINDS: Mapping[str, Callable[[tuple[Any, ...], object], bool]] = {
    "SET": _is_number,
    "SADD": _is_number,
    "STRLEN": _is_number,
    "PTTL": _is_number,
    "PEXPIRE": _is_number,
    "UNLINK": _is_number,
    "GET": _is_value,
    "MGET": _are_values,
    "SMEMBERS": _are_members,
    "SCAN": _is_page,
    "INFO": _is_table,
}
"""How the library gives the answers of the commands that we send. True and False are numbers."""
