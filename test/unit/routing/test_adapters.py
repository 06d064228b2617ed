"""Modules that are loaded and unloaded through the router: on all workers that serve adapters, or on none."""

import asyncio
import contextlib
import dataclasses

import pytest

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing import adapters
from test.unit.routing.routing_harness import FakeWorker, info, run, running_system, until


@contextlib.asynccontextmanager
async def adapter_system(*, modules=("planner", "planner"), bases=("base-1", "base-1"), **config):
    """`coder` on workers of its own; the adapter `planner` on two members that were added."""
    workers = [
        FakeWorker(info(Role.DECODE, "base", modules=[name], base_fingerprint=base))
        for name, base in zip(modules, bases, strict=True)
    ]
    for worker in workers:
        await worker.start()
    try:
        async with running_system(decode={"coder": 1}, admin_api_key="k", **config) as system:
            for worker in workers:
                await system.admin("POST", "/admin/workers", {"url": worker.url})
            await until(lambda: all(system.router.pool[w.url].info is not None for w in workers))
            yield system, workers
    finally:
        for worker in workers:
            await worker.stop()


def load(system, name: str = "tester", **more):
    return system.admin("POST", "/modules", {"name": name, "path": "/adapters/x", **more})


async def names(system) -> list[str]:
    return [card["id"] for card in (await system.get("/v1/models")).json()["data"]]


def test_a_module_is_loaded_on_all_workers_with_adapters_and_served_at_once():
    async def scenario():
        async with adapter_system(worker_api_key="w") as (system, workers):
            answer = await load(system)
            assert answer.status == 200
            assert answer.json() == {"name": "tester", "workers": [worker.url for worker in workers]}
            for worker in workers:
                told = {"lora_name": "tester", "lora_path": "/adapters/x", "key": "Bearer w"}
                assert worker.adapter_calls == [{"load": told}]
            assert not system.decode["coder"][0].adapter_calls
            assert await names(system) == ["coder", "planner", "tester"]
            assert (await system.chat("tester")).status == 200
            [leg] = [seen for worker in workers for seen in worker.seen]
            assert leg.body["model"] == "tester"

    run(scenario())


def test_where_one_worker_refuses_none_keeps_it_and_its_reason_is_the_answer():
    async def scenario():
        async with adapter_system() as (system, workers):
            workers[1].adapters_refused = "rank 64 is above --max-lora-rank 16"
            for _ in range(2):
                answer = await load(system)
                assert answer.status == 400
                assert workers[1].url in answer.error and "rank 64 is above --max-lora-rank 16" in answer.error
                assert [worker.info.modules for worker in workers] == [["planner"], ["planner"]]
                assert await names(system) == ["coder", "planner"]
                assert (await system.chat("tester")).status == 404
                assert (await system.chat("planner")).status == 200
            workers[1].adapters_refused = None
            assert (await load(system)).status == 200

    run(scenario())


def test_a_worker_that_gives_no_answer_leaves_nothing_loaded():
    async def scenario():
        async with adapter_system(admin_timeout_s=0.2) as (system, workers):
            workers[1].adapters_behave = "hang"
            answer = await load(system)
            assert answer.status == 502 and workers[1].url in answer.error and "did not answer" in answer.error
            assert [worker.info.modules for worker in workers] == [["planner"], ["planner"]]
            assert {"unload": "tester"} in workers[1].adapter_calls, "it may have loaded it all the same"
            assert await names(system) == ["coder", "planner"]

    run(scenario())


def test_a_router_that_restarted_takes_a_module_that_the_workers_still_have():
    def left_over(prefill, decode):
        decode["planner"][0].info = info(Role.DECODE, "base", modules=["planner", "tester"])

    async def scenario():
        async with running_system(decode={"planner": 1}, prepare=left_over, admin_api_key="k") as system:
            assert await names(system) == ["planner"], "as it is configured"
            assert (await load(system)).status == 200
            assert (await system.chat("tester")).status == 200

    run(scenario())


def test_a_worker_of_the_flags_may_lose_all_its_modules_and_get_others():
    def adapters_only(prefill, decode):
        decode["planner"][0].info = info(Role.DECODE, "base", modules=["planner"])

    async def scenario():
        async with running_system(decode={"planner": 1}, prepare=adapters_only, admin_api_key="k") as system:
            assert (await system.admin("DELETE", "/modules/planner")).status == 200
            assert system.decode["planner"][0].info.modules == [] and await names(system) == []
            assert (await system.get("/health")).status == 503
            assert (await load(system)).status == 200
            assert await names(system) == ["tester"] and (await system.chat("tester")).status == 200
            assert (await load(system, "planner")).status == 200
            assert await names(system) == ["planner", "tester"] and (await system.get("/health")).status == 200

    run(scenario())


def test_what_cannot_be_loaded_is_said_with_the_next_step():
    async def scenario():
        async with adapter_system() as (system, workers):
            for name in ("planner", "coder"):
                twice = await load(system, name)
                assert twice.status == 409 and "Delete it first" in twice.error
            for name in ("", "a b", "a?b"):
                assert (await load(system, name)).status == 400
            assert "path is empty" in (await load(system, path="")).error
            assert not any(worker.adapter_calls for worker in workers)
        async with running_system(admin_api_key="k") as system:
            answer = await load(system)
            assert answer.status == 400 and "--lora-paths" in answer.error

    run(scenario())


def test_two_that_load_one_name_get_one_module():
    async def scenario():
        async with adapter_system() as (system, workers):
            found = await asyncio.gather(load(system), load(system))
            assert sorted(answer.status for answer in found) == [200, 409]
            assert all(len(worker.adapter_calls) == 1 for worker in workers)

    run(scenario())


def test_an_adapter_goes_to_the_workers_of_its_base():
    async def scenario():
        two = {"modules": ("planner", "critic"), "bases": ("base-1", "base-2")}
        async with adapter_system(**two, prefill=2, prepare=second_base) as (system, workers):
            await until(lambda: len(system.router.pool.bases.known) == 2)
            answer = await load(system)
            assert answer.status == 400 and "base-1, base-2" in answer.error
            assert (await load(system, base="base-3")).status == 503
            answer = await load(system, "tester", base="base-1")
            assert answer.status == 200 and answer.json()["workers"] == [workers[0].url]
            assert (await system.chat("tester")).status == 200

    def second_base(prefill, decode):
        prefill[1].info = dataclasses.replace(prefill[1].info, base_fingerprint="base-2")

    run(scenario())


def test_a_module_is_unloaded_after_its_requests():
    async def scenario():
        async with adapter_system() as (system, workers):
            await load(system)
            for worker in workers:
                worker.behave = "slow:0.3"
            running = asyncio.create_task(system.chat("tester", user="s"))
            await until(lambda: any(worker.seen for worker in workers))
            deleting = asyncio.create_task(system.admin("DELETE", "/modules/tester"))
            await until(lambda: "tester" not in system.router.pool.modules)
            gone = await system.chat("tester")
            assert gone.status == 404 and "coder, planner" in gone.error
            assert (await load(system)).status == 409, "while it is taken away"
            assert not any({"unload": "tester"} in worker.adapter_calls for worker in workers)
            assert (await running).status == 200
            deleted = await deleting
            assert deleted.status == 200 and deleted.json()["workers"] == [worker.url for worker in workers]
            assert [worker.info.modules for worker in workers] == [["planner"], ["planner"]]
            assert await names(system) == ["coder", "planner"]
            assert (await load(system)).status == 200, "the name is free again"
            assert await names(system) == ["coder", "planner", "tester"]

    run(scenario())


def test_requests_that_take_longer_than_the_deadline_do_not_keep_a_module():
    async def scenario():
        async with adapter_system(drain_deadline_s=0.05) as (system, workers):
            for worker in workers:
                worker.behave = "slow:0.4"
            running = asyncio.create_task(system.chat("planner"))
            await until(lambda: any(worker.seen for worker in workers))
            assert (await system.admin("DELETE", "/modules/planner")).status == 200
            assert not running.done() and (await running).status == 200, "the worker lets it finish"

    run(scenario())


def test_what_cannot_be_unloaded_is_said_with_the_next_step():
    async def scenario():
        async with adapter_system() as (system, _):
            unknown = await system.admin("DELETE", "/modules/nobody")
            assert unknown.status == 404 and "coder, planner" in unknown.error
            own = await system.admin("DELETE", "/modules/coder")
            assert own.status == 400
            assert f"DELETE /admin/workers?url={system.decode['coder'][0].url}" in own.error
            assert (await system.chat("coder")).status == 200

    run(scenario())


def test_a_worker_that_comes_later_or_comes_back_gets_the_modules():
    async def scenario():
        async with adapter_system() as (system, workers):
            await load(system)
            late = FakeWorker(info(Role.DECODE, "base", modules=[]))
            await late.start()
            try:
                await system.admin("POST", "/admin/workers", {"url": late.url})
                await until(lambda: late.info.modules == ["tester"])
                await workers[0].stop()
                await until(lambda: system.router.pool[workers[0].url].status == "down")
                workers[0].info = dataclasses.replace(workers[0].info, modules=["planner"])
                await workers[0].start()
                await until(lambda: system.router.pool[workers[0].url].is_ready_for("tester"))
                await system.admin("DELETE", "/modules/tester")
                assert late.info.modules == []
            finally:
                await late.stop()

    run(scenario())


def test_a_worker_that_refuses_what_others_have_serves_the_rest_and_is_not_asked_again_at_once():
    async def scenario():
        async with adapter_system() as (system, _):
            await load(system)
            late = FakeWorker(info(Role.DECODE, "base", modules=["planner"]), adapters_refused="no such folder")
            await late.start()
            try:
                await system.admin("POST", "/admin/workers", {"url": late.url})
                await until(lambda: bool(late.adapter_calls))
                polls = len(late.poll_headers)
                await until(lambda: len(late.poll_headers) > polls + 3)
                assert len(late.adapter_calls) == 1
                worker = system.router.pool[late.url]
                assert worker.is_ready_for("planner") and not worker.is_ready_for("tester")
                assert (await system.chat("tester")).status == 200
            finally:
                await late.stop()

    run(scenario())


def test_a_deleted_module_of_a_worker_that_restarts_stays_away_until_it_is_loaded_again():
    async def scenario():
        async with adapter_system() as (system, workers):
            assert (await system.admin("DELETE", "/modules/planner")).status == 200
            for worker in workers:  # its flags name the module
                worker.info = dataclasses.replace(worker.info, modules=["planner"])
            await until(lambda: all(system.router.pool[w.url].adapters == ["planner"] for w in workers))
            assert (await system.chat("planner")).status == 404
            assert (await system.get("/workers")).json()["withdrawn_modules"] == ["planner"]
            assert (await load(system, "planner")).status == 200
            assert [key for call in workers[0].adapter_calls[-2:] for key in call] == ["unload", "load"]
            assert (await system.chat("planner")).status == 200

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b'{"success": false, "error_message": "no"}', "no"),
        (b'{"error": {"message": "closed", "code": 400}}', "closed"),
        (b'{"error": "odd"}', "odd"),
        (b"[1]", "[1]"),
        (b"plain \xff", "plain \ufffd"),
    ],
)
def test_a_workers_words_are_found(answer, text):
    assert adapters._text_of(answer) == text
