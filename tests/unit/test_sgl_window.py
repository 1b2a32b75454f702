"""How much is in an engine at a time."""

import asyncio

from torchspec_lib.inference.engine.token_window import TokenWindow


def admitted(capacity: int, sizes: list[int], finish: list[int]) -> list[list[int]]:
    """Who is inside at first, and after each of ``finish`` has left."""

    async def run() -> list[list[int]]:
        window, inside = TokenWindow(capacity), []
        leave = [asyncio.Event() for _ in sizes]

        async def visit(index: int) -> None:
            async with window.room(sizes[index]):
                inside.append(index)
                await leave[index].wait()
                inside.remove(index)

        async def settle() -> list[int]:
            for _ in range(20):
                await asyncio.sleep(0)
            return sorted(inside)

        async with asyncio.TaskGroup() as tasks:
            for index in range(len(sizes)):
                tasks.create_task(visit(index))
            seen = [await settle()]
            for index in finish:
                leave[index].set()
                seen.append(await settle())
            for event in leave:
                event.set()
        return seen

    return asyncio.run(run())


def test_prompts_enter_as_long_as_their_tokens_fit():
    assert admitted(10, [4, 4, 4], []) == [[0, 1]]


def test_one_that_leaves_lets_the_next_in_whatever_became_of_the_others():
    assert admitted(10, [4, 4, 4, 4], [1, 0]) == [[0, 1], [0, 2], [2, 3]]


def test_a_large_prompt_is_not_overtaken_by_small_ones():
    assert admitted(10, [6, 8, 1], [0]) == [[0], [1, 2]]


def test_a_prompt_larger_than_the_window_enters_an_empty_one():
    assert admitted(10, [3, 50, 3], [0, 1]) == [[0], [1], [2]]
