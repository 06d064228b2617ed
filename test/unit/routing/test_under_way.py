"""When the last request for a module has ended."""

import asyncio

import pytest

from sglang_prefillshare.routing.under_way import UnderWay


def test_the_last_request_of_a_module_is_waited_for_and_others_are_not():
    async def scenario():
        counts = UnderWay()
        assert await counts.none_left("planner", timeout_s=0)
        with counts.one("coder"):
            with counts.one("planner"):
                waiting = asyncio.create_task(counts.none_left("planner", timeout_s=5))
                with pytest.raises(ValueError), counts.one("planner"):
                    raise ValueError
                await asyncio.sleep(0)
                assert counts["planner"] == 1 and not waiting.done()
            assert await waiting
            assert not await counts.none_left("coder", timeout_s=0.01)
        assert counts["coder"] == 0 and await counts.none_left("coder", timeout_s=0)

    asyncio.run(scenario())
