"""Has grammars compiled beside the engine, before their calls reach it. Knows no engine and no language of grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from kvservice.errors import InvalidRequest
from kvservice.types import EngineCall, Grammar

PATIENCE_S = 3.0
"""How long a call waits for its grammar. The library's limits end what is hostile in some tenths of a second."""


class GrammarDesk:
    """Where a call with a grammar goes first.

    Args:
        compile_grammar: raises InvalidRequest for what can't be used, and keeps what it has made for the engine. None:
            the engine takes grammars as they are.
        thread: where that is done.
    """

    def __init__(self, compile_grammar: Callable[[Grammar], object] | None, thread: Executor) -> None:
        self._compile = compile_grammar
        self._thread = thread

    async def check(self, call: EngineCall) -> None:
        """Returns once the engine has the call's grammar at hand.

        Raises:
            InvalidRequest: the grammar is wrong, too big, or takes too long.
        """
        grammar = call.sampling.grammar if call.sampling else None
        if grammar is None or self._compile is None:
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, grammar)
        except TimeoutError:
            raise InvalidRequest(
                f"the {grammar.kind.value} wasn't compiled within {PATIENCE_S:.0f} s: simplify it",
                field="sampling.grammar",
            ) from None
