"""How much may be in an engine at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TokenWindow:
    """Admits prompts in the order they come, as long as their tokens fit; one always does."""

    def __init__(self, num_tokens: int) -> None:
        self._capacity, self._used = num_tokens, 0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def room(self, num_tokens: int) -> AsyncIterator[None]:
        """Hold room for a prompt of ``num_tokens``."""
        async with self._turn, self._changed:
            await self._changed.wait_for(
                lambda: self._used == 0 or self._used + num_tokens <= self._capacity
            )
            self._used += num_tokens
        try:
            yield
        finally:
            async with self._changed:
                self._used -= num_tokens
                self._changed.notify_all()
