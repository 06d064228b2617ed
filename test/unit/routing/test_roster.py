"""Members come, leave and are forgotten while the router serves."""

import asyncio
import os
from pathlib import Path

import pytest

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import DnsSource, FileSource
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.roster import Roster
from sglang_prefillshare.routing.sources import DnsReader
from sglang_prefillshare.routing.workers import WorkerPool
from test.unit.routing.routing_harness import FakeWorker, info, run, running_system, until

LONG = [{"role": "user", "content": "x" * 2000}]


def write(path: Path, *workers: FakeWorker) -> None:
    beside = path.with_suffix(".new")
    beside.write_text("workers:\n" + "".join(f"  - {worker.url}\n" for worker in workers))
    os.replace(beside, path)


def from_file(path: Path, *models: str, prefill: int = 1, **more):
    """A router that knows its workers from a file alone: at first the prefill workers and those of `models`."""

    def prepare(prefill_workers, decode):
        write(path, *prefill_workers, *(worker for name in models for worker in decode[name]))

    return running_system(
        configured=False, prefill=prefill, prepare=prepare, sources=[FileSource(str(path))], wait=True, **more
    )


async def model_names(system) -> list[str]:
    return [card["id"] for card in (await system.get("/v1/models")).json()["data"]]


def test_a_module_comes_with_its_first_worker_and_goes_with_its_last(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner") as system:
            planner, coder = system.decode["planner"][0], system.decode["coder"][0]
            assert await model_names(system) == ["planner"]
            assert (await system.chat("planner", messages=LONG, user="s")).status == 200
            assert (await system.chat("coder")).status == 404
            write(path, system.prefill[0], planner, coder)
            await until(lambda: system.router.pool.served_modules() == ["planner", "coder"])
            assert await model_names(system) == ["planner", "coder"]
            assert (await system.chat("coder")).status == 200
            assert (await system.get("/m/coder/health")).status == 200
            assert planner.url in (await system.get("/metrics")).body.decode()
            write(path, system.prefill[0], coder)
            await until(lambda: system.router.pool.modules == ["coder"])
            assert await model_names(system) == ["coder"]
            gone = await system.chat("planner")
            assert gone.status == 404 and "coder" in gone.error
            assert system.router.index.block_count(planner.url) == 0
            assert planner.url not in (await system.get("/metrics")).body.decode()
            told = (await system.get("/workers")).json()
            assert [worker["url"] for worker in told["workers"]] == [system.prefill[0].url, coder.url]
            polls = len(planner.poll_headers)
            await asyncio.sleep(0.1)
            assert len(planner.poll_headers) == polls, "nobody asks a worker that is forgotten"

    run(scenario())


def test_a_session_of_a_worker_that_left_is_placed_as_if_it_were_new(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner", prefill=2) as system:
            for _ in range(2):
                await system.chat("planner", user="s")
            [there] = [worker for worker in system.prefill if worker.seen]
            [other] = [worker for worker in system.prefill if not worker.seen]
            write(path, other, *system.decode["planner"])
            await until(lambda: there.url not in system.router.pool)
            assert (await system.chat("planner", user="s")).status == 200
            assert (await system.last_call())["decision"] == "new_session" and len(other.seen) == 1

    run(scenario())


def test_requests_on_a_worker_that_leaves_finish_and_new_ones_do_not_come(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner", decode={"planner": 2}) as system:
            for worker in system.decode["planner"]:
                worker.behave = "slow:0.4"
            running = asyncio.create_task(system.chat("planner", stream=True))
            await until(lambda: any(worker.seen for worker in system.decode["planner"]))
            [leaving] = [worker for worker in system.decode["planner"] if worker.seen]
            [other] = [worker for worker in system.decode["planner"] if not worker.seen]
            other.behave = "ok"
            write(path, *system.prefill, other)
            await until(lambda: system.router.pool[leaving.url].is_leaving)
            told = {w["url"]: w for w in (await system.get("/workers")).json()["workers"]}
            assert (told[leaving.url]["status"], told[leaving.url]["reason"]) == ("draining", "it leaves")
            for _ in range(3):
                assert (await system.chat("planner")).status == 200
            assert len(leaving.seen) == 1 and len(other.seen) == 3
            answer = await running
            assert answer.status == 200 and answer.body.endswith(b"[DONE]\n\n")
            await until(lambda: leaving.url not in system.router.pool)
            assert leaving.aborted == []
            system.assert_idle()

    run(scenario())


def test_requests_that_outlast_the_drain_deadline_fail_and_the_worker_is_told(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner", "coder", drain_deadline_s=0.1) as system:
            leaving = system.decode["planner"][0]
            leaving.behave = "hang"
            running = asyncio.create_task(system.chat("planner"))
            await leaving.arrived.wait()
            write(path, *system.prefill, *system.decode["coder"])
            answer = await running
            assert answer.status == 503 and "was taken out" in answer.error
            await until(lambda: leaving.aborted != [] and leaving.url not in system.router.pool)
            assert (await system.chat("coder")).status == 200
            system.assert_idle()

    run(scenario())


def test_a_worker_that_is_named_again_while_it_drains_stays(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner") as system:
            worker = system.decode["planner"][0]
            worker.behave = "slow:0.4"
            running = asyncio.create_task(system.chat("planner"))
            await worker.arrived.wait()
            write(path, *system.prefill)
            await until(lambda: system.router.pool[worker.url].is_leaving)
            assert (await system.chat("planner")).status == 503
            write(path, *system.prefill, worker)
            await until(lambda: not system.router.pool[worker.url].is_leaving)
            assert (await running).status == 200
            assert (await system.chat("planner")).status == 200
            assert worker.url in system.router.pool

    run(scenario())


def test_a_module_moves_to_a_new_base_without_a_request_lost():
    """Prefill and decode of the new base come beside the old ones; when the old worker drains, the new one serves."""

    async def scenario():
        base, new = (
            FakeWorker(info(role, model, base_fingerprint="base-2"))
            for role, model in ((Role.PREFILL, "base"), (Role.DECODE, "planner"))
        )
        try:
            async with running_system(decode={"planner": 1}, admin_api_key="k") as system:
                pool, old = system.router.pool, system.decode["planner"][0]
                for worker in (base, new):
                    await worker.start()
                    await system.admin("POST", "/admin/workers", {"url": worker.url})
                await until(lambda: "served on base-1" in str(pool[new.url].reason))
                old.behave = "slow:0.3"
                running = asyncio.create_task(system.chat(user="s"))
                await old.arrived.wait()
                await system.admin("DELETE", f"/admin/workers?url={old.url}")
                assert pool.base_of("planner") == "base-2"
                for _ in range(3):
                    assert (await system.chat(user="s")).status == 200
                assert (await running).status == 200
                assert [len(worker.seen) for worker in (old, new, system.prefill[0], base)] == [1, 3, 1, 3]
                assert (await system.get("/health")).status == 200
        finally:
            for worker in (base, new):
                await worker.stop()

    run(scenario())


@pytest.mark.parametrize("broken", ["", "workers: [", "workers: []", "workers: [h:1]"])
def test_a_broken_file_keeps_the_last_good_set_and_says_so(tmp_path, broken):
    async def scenario():
        path = tmp_path / "workers.yaml"
        async with from_file(path, "planner") as system:
            path.write_text(broken)
            roster = system.router.roster
            await until(lambda: any(source["problem"] for source in roster.to_json()))
            [source] = [s for s in (await system.get("/workers")).json()["sources"] if s["source"].startswith("file:")]
            assert source["members"] == 2 and "workers.yaml" in source["problem"]
            assert (await system.chat("planner")).status == 200
            write(path, *system.workers)
            await until(lambda: len(system.router.pool.served_modules()) == 2)
            assert not any(source["problem"] for source in roster.to_json())

    run(scenario())


def test_the_workers_of_the_flags_stay_beside_those_of_a_file(tmp_path):
    async def scenario():
        path = tmp_path / "workers.yaml"
        more = FakeWorker(info(Role.DECODE, "tester"))
        await more.start()
        write(path, more)
        try:
            async with running_system(sources=[FileSource(str(path))]) as system:
                await until(lambda: "tester" in system.router.pool.served_modules())
                assert await model_names(system) == ["planner", "coder", "tester"]
                write(path, system.decode["coder"][0])  # named twice now, and still what the flags want
                await until(lambda: more.url not in system.router.pool)
                coder = system.decode["coder"][0].url
                [told] = [w for w in (await system.get("/workers")).json()["workers"] if w["url"] == coder]
                assert told["sources"] == ["static", f"file:{path}"] and told["is_configured"]
        finally:
            await more.stop()

    run(scenario())


def test_a_name_is_resolved_again_and_a_failure_changes_nothing():
    answers = [["10.0.0.1"], OSError("no route"), ["10.0.0.1", "10.0.0.2"], ["10.0.0.2"]]
    seen: list[list[str]] = []
    polled: set[str] = set()

    async def resolve(name, port):
        answer = answers[min(len(seen), len(answers) - 1)]
        seen.append(list(pool.urls))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def poll(worker):
        polled.add(worker.url)

    async def scenario():
        source = DnsSource("workers", 5)
        async with asyncio.TaskGroup() as group:
            roster = Roster(
                config,
                pool=pool,
                poll=poll,
                on_forgotten=lambda worker: None,
                group=group,
                readers={str(source): DnsReader(source, interval_s=0.001, resolve=resolve)},
            )
            roster.start()
            await until(lambda: len(seen) > len(answers))
            roster.stop()

    config = RouterConfig(sources=[DnsSource("workers", 5)], poll_interval_s=0.01)
    pool = WorkerPool(config, index=PrefixIndex(capacity_blocks=1))
    asyncio.run(scenario())
    one, two = "http://10.0.0.1:5", "http://10.0.0.2:5"
    assert seen[:5] == [[], [one], [one], [one, two], [two]]
    assert polled == {one, two}
