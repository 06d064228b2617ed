"""Several answers to one prompt: in which order they are asked for, and how they are put together."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_prefillshare.host.http import samples
from sglang_prefillshare.host.http.samples import answer_prompt_first, sample_count, split
from sglang_prefillshare.request_fields import MAX_BATCH


def request(**fields: Any) -> GenerateReqInput:
    return GenerateReqInput(**fields)


def paired(count: int, **fields: Any) -> GenerateReqInput:
    return request(
        rid=[f"r{i}" for i in range(count)],
        bootstrap_room=list(range(count)),
        bootstrap_host=["h"] * count,
        bootstrap_port=[1] * count,
        **fields,
    )


def test_n_is_read_wherever_it_stands() -> None:
    assert sample_count(request(text="a")) == 1
    assert sample_count(request(text="a", sampling_params={"n": None})) == 1
    assert sample_count(request(text=["a", "b"], sampling_params=[{"n": 3}, {"n": 3}])) == 3
    for wrong in (0, 129, 2.0, True, "2", [2], {}):
        with pytest.raises(ValueError, match="n is"):
            sample_count(request(text="a", sampling_params={"n": wrong}))
    with pytest.raises(ValueError, match="differs"):
        sample_count(request(text=["a", "b"], sampling_params=[{"n": 2}, {}]))


def test_a_request_is_taken_apart_and_stays_what_it_was() -> None:
    whole = paired(6, text=["a", "b"], sampling_params=[{"n": 3, "top_k": 1}, {"n": 3}], return_logprob=[True, False])
    before = copy.deepcopy(whole)
    firsts, others = split(whole, 3)
    assert (firsts.text, others.text) == (["a", "b"], ["a", "a", "b", "b"])
    assert (firsts.rid, others.rid) == (["r0", "r3"], ["r1", "r2", "r4", "r5"])
    assert (firsts.bootstrap_room, others.bootstrap_room) == ([0, 3], [1, 2, 4, 5])
    assert others.return_logprob == [True, True, False, False]
    assert firsts.sampling_params == [{"n": 1, "top_k": 1}, {"n": 1}]
    assert others.sampling_params == [{"n": 1, "top_k": 1}] * 2 + [{"n": 1}] * 2
    assert whole == before
    # SGLang reads both halves as batches of requests for one answer each.
    for half, size in ((firsts, 2), (others, 4)):
        half.normalize_batch_and_arguments()
        assert (half.batch_size, half.parallel_sample_num, len(half.bootstrap_room)) == (size, 1, size)


def test_one_prompt_and_a_name_for_all_are_enough_without_rooms() -> None:
    firsts, others = split(request(input_ids=[5, 6], rid="r", sampling_params={"n": 3}, token_ids_logprob=[1, 2]), 3)
    assert (firsts.input_ids, others.input_ids) == ([[5, 6]], [[5, 6], [5, 6]])
    assert (firsts.rid, others.rid) == (["r_0"], ["r_1", "r_2"])
    nameless = split(request(text="a", sampling_params={"n": 3}), 3)
    assert len({*nameless[0].rid, *nameless[1].rid}) == 3
    others.normalize_batch_and_arguments()
    assert others.token_ids_logprob == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("whole", "count", "says"),
    [
        (request(text="a", sampling_params={"n": 2}, bootstrap_room=5), 2, "each of 2 answers needs its own"),
        (paired(3, text="a", sampling_params={"n": 2}), 2, "bootstrap_host lists 3 values"),
        (request(text=["a"] * 512, sampling_params={"n": 3}), 3, f"at most {MAX_BATCH}"),
    ],
)
def test_what_fits_no_answer_is_refused(whole: GenerateReqInput, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split(whole, count)


class Engine:
    """Answers batches as SGLang does, when it is told to; `asked` are the prompts of each batch, in order."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.may_go = asyncio.Event()
        self.closed = 0
        self.reason: Any = {"type": "length"}

    def answer(self, rid: str, text: str, *, is_last: bool = True) -> dict[str, Any]:
        return {"text": text, "meta_info": {"id": rid, "finish_reason": self.reason if is_last else None}}

    async def generate(self, half: Any) -> AsyncGenerator[Any, None]:
        self.asked.append(half.rid)
        is_first = len(self.asked) == 1
        try:
            if half.stream:
                for place, rid in enumerate(half.rid):
                    yield self.answer(rid, "be", is_last=False) | {"index": place}
            if is_first:
                await self.may_go.wait()
            whole = [self.answer(rid, f"of {rid}") for rid in half.rid]
            if half.stream:
                for place, answer in reversed(list(enumerate(whole))):
                    yield answer | {"index": place}
            else:
                yield whole
        finally:
            self.closed += 1


Scenario = Callable[[Engine], Coroutine[Any, Any, None]]


def play(scenario: Scenario) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await scenario(Engine())

    asyncio.run(limited())


async def stay() -> bool:
    return False


def answers(engine: Engine, whole: Any, *, is_prefill: bool = False, **options: Any) -> AsyncGenerator[Any, None]:
    options = {"can_stream": True, "is_gone": stay} | options
    return answer_prompt_first(engine.generate, whole, 3, is_prefill=is_prefill, **options)


def six(**fields: Any) -> GenerateReqInput:
    return paired(6, text=["a", "b"], sampling_params={"n": 3}, **fields)


FIRSTS, OTHERS = ["r0", "r3"], ["r1", "r2", "r4", "r5"]


def test_on_prefill_the_first_answers_are_whole_before_the_others_are_asked_for() -> None:
    async def scenario(engine: Engine) -> None:
        task = asyncio.ensure_future(anext(answers(engine, six(stream=False), is_prefill=True)))
        await asyncio.sleep(0.05)
        assert engine.asked == [FIRSTS]
        engine.may_go.set()
        whole = await task
        assert engine.asked == [FIRSTS, OTHERS]
        assert [answer["meta_info"]["id"] for answer in whole] == [f"r{i}" for i in range(6)]

    play(scenario)


def test_on_decode_the_others_follow_when_the_first_have_begun() -> None:
    async def scenario(engine: Engine) -> None:
        whole = six(stream=False)
        task = asyncio.ensure_future(anext(answers(engine, whole)))
        await asyncio.sleep(0.05)
        assert engine.asked == [FIRSTS, OTHERS] and whole.stream is False
        engine.may_go.set()
        assert [answer["text"] for answer in await task] == [f"of r{i}" for i in range(6)]

    play(scenario)


def test_a_stream_has_the_pieces_of_all_with_their_places() -> None:
    async def scenario(engine: Engine) -> None:
        engine.may_go.set()
        whole = six(stream=True)
        pieces = [piece async for piece in answers(engine, whole)]
        # What SGLang's background task reads once the stream has ended: without it, it would end the connection.
        assert whole.is_single is False and sorted(whole.rid) == sorted(FIRSTS + OTHERS)
        assert len(pieces) == 12
        assert {piece["index"]: piece["text"] for piece in pieces} == {i: f"of r{i}" for i in range(6)}
        assert all(piece["meta_info"]["id"] == f"r{piece['index']}" for piece in pieces)

    play(scenario)


def test_a_long_queue_does_not_hold_the_others_back_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "HEAD_START_S", 0.05)

    async def scenario(engine: Engine) -> None:
        silent = engine.generate

        async def generate(half: Any) -> AsyncGenerator[Any, None]:
            if not engine.asked:
                engine.asked.append(half.rid)
                await engine.may_go.wait()
                yield engine.answer("r0", "late") | {"index": 0}
                yield engine.answer("r3", "late") | {"index": 1}
            else:
                async for piece in silent(half):
                    yield piece

        stream = answer_prompt_first(generate, six(stream=False), 3, is_prefill=False, can_stream=True, is_gone=stay)
        task = asyncio.ensure_future(anext(stream))
        while len(engine.asked) < 2:  # noqa: ASYNC110 - plain state
            await asyncio.sleep(0.01)
        engine.may_go.set()
        assert (await task)[0]["text"] == "late"

    play(scenario)


def test_where_no_stream_may_be_made_all_are_asked_for_at_once() -> None:
    async def scenario(engine: Engine) -> None:
        task = asyncio.ensure_future(anext(answers(engine, six(stream=False), can_stream=False)))
        await asyncio.sleep(0.05)
        assert engine.asked == [FIRSTS, OTHERS]
        engine.may_go.set()
        assert len(await task) == 6

    play(scenario)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, ValueError), (503, Exception)], ids=["the request's fault", "the worker's"]
)
def test_an_aborted_answer_is_the_error_that_sglang_makes_of_it(status: int, kind: type[Exception]) -> None:
    async def scenario(engine: Engine) -> None:
        engine.reason = {"type": "abort", "status_code": status, "message": "no room"}
        engine.may_go.set()
        with pytest.raises(kind, match="no room") as raised:
            await anext(answers(engine, six(stream=False)))
        assert getattr(raised.value, "status_code", 400) == status
        assert engine.closed == len(engine.asked)

    play(scenario)


def test_a_client_that_has_left_is_asked_nothing_more_for() -> None:
    async def scenario(engine: Engine) -> None:
        async def gone() -> bool:
            return True

        engine.may_go.set()
        with pytest.raises(ValueError, match="left"):
            await anext(answers(engine, six(stream=False), is_prefill=True, is_gone=gone))
        assert engine.asked == [FIRSTS]

    play(scenario)


def test_a_stream_that_is_closed_ends_both_halves() -> None:
    async def scenario(engine: Engine) -> None:
        stream = answers(engine, six(stream=True))
        await anext(stream)
        while len(engine.asked) < 2:  # noqa: ASYNC110 - plain state
            await asyncio.sleep(0.01)
        await stream.aclose()
        assert engine.closed == 2

    play(scenario)
