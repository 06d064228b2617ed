"""Who may change members, and what happens then."""

import asyncio
import json

import pytest

from sglang_prefillshare.protocol import Role
from test.unit.routing.routing_harness import FakeWorker, info, run, running_system, until

ENDPOINTS = [
    ("POST", "/admin/workers"),
    ("DELETE", "/admin/workers?url=http://a:1"),
    ("POST", "/admin/workers/drain"),
    ("POST", "/modules"),
    ("DELETE", "/modules/planner"),
]


def test_without_a_key_the_endpoints_are_closed_and_say_which_flag_opens_them():
    async def scenario():
        async with running_system() as system:
            for method, path in ENDPOINTS:
                for key in ("k", None, ""):
                    answer = await system.admin(method, path, key=key)
                    assert answer.status == 403 and "--admin-api-key" in answer.error

    run(scenario())


def test_with_one_only_who_shows_it_gets_in_and_nothing_is_read_before():
    async def scenario():
        async with running_system(admin_api_key="secret", worker_api_key="w") as system:
            for method, path in ENDPOINTS:
                for key in (None, "", "k", "secre", "secrets", "w", "s\xe9cret"):
                    answer = await system.admin(method, path, b"{not json", key=key)
                    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "secret" not in (await system.get("/workers")).body.decode()
            assert len(system.router.pool.urls) == 3 and system.router.pool.modules == ["planner", "coder"]

    run(scenario())


def test_a_worker_is_added_serves_and_is_removed():
    async def scenario():
        tester = FakeWorker(info(Role.DECODE, "tester"))
        await tester.start()
        try:
            async with running_system(admin_api_key="k") as system:
                added = await system.admin("POST", "/admin/workers", {"url": tester.url + "/"})
                assert added.status == 201
                assert (added.json()["url"], added.json()["status"]) == (tester.url, "starting")
                await until(lambda: "tester" in system.router.pool.served_modules())
                assert (await system.admin("POST", "/admin/workers", {"url": tester.url})).status == 200
                assert (await system.chat("tester")).status == 200
                tester.behave = "slow:0.3"
                running = asyncio.create_task(system.chat("tester"))
                await until(lambda: len(tester.seen) == 2)
                removed = await system.admin("DELETE", f"/admin/workers?url={tester.url}")
                assert removed.status == 202 and removed.json()["status"] == "draining"
                assert (await system.chat("tester")).status == 503
                assert (await running).status == 200
                await until(lambda: tester.url not in system.router.pool)
                assert (await system.chat("tester")).status == 404
                again = await system.admin("DELETE", f"/admin/workers?url={tester.url}")
                assert again.status == 404 and system.prefill[0].url in again.error
        finally:
            await tester.stop()

    run(scenario())


def test_a_worker_of_the_flags_that_was_removed_stays_out_until_it_is_added():
    async def scenario():
        async with running_system(admin_api_key="k") as system:
            coder = system.decode["coder"][0]
            assert (await system.admin("DELETE", f"/admin/workers?url={coder.url}")).status == 202
            assert coder.url not in system.router.pool
            refused = await system.chat("coder")
            assert refused.status == 503 and "there is none" in refused.error, "the module is configured"
            system.router.roster.update("static", system.router.config.members)
            assert coder.url not in system.router.pool
            assert (await system.admin("POST", "/admin/workers", {"url": coder.url})).status == 201
            await system.ready()
            assert (await system.chat("coder")).status == 200
            assert system.router.pool[coder.url].is_configured

    run(scenario())


def test_a_worker_that_is_drained_keeps_its_place_and_takes_requests_again():
    async def scenario():
        async with running_system(prefill=2, admin_api_key="k") as system:
            first = system.prefill[0]
            body = {"url": first.url, "is_draining": True}
            for _ in range(2):
                answer = await system.admin("POST", "/admin/workers/drain", body)
                assert answer.status == 200 and answer.json()["status"] == "draining"
            for _ in range(4):
                assert (await system.chat()).status == 200
            assert not first.seen and len(system.prefill[1].seen) == 4
            await system.admin("POST", "/admin/workers/drain", body | {"is_draining": False})
            for i in range(4):
                assert (await system.chat(messages=[{"role": "user", "content": str(i)}])).status == 200
            assert first.seen

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/admin/workers", b"", "truncated"),
        ("/admin/workers", b"{", "Wanted a JSON object of: url"),
        ("/admin/workers", b"[" * 50_000, "cannot be used"),
        ("/admin/workers", b"x" * 70_000, "65536 bytes"),
        ("/admin/workers", {}, "required field `url`"),
        ("/admin/workers", {"url": 5}, "Expected `str`"),
        ("/admin/workers", {"url": "a:1"}, "http://host:port"),
        ("/admin/workers", {"url": "http://a:1?x"}, "http://host:port"),
        ("/admin/workers", {"url": "http://a:1", "role": "prefill"}, "unknown field `role`"),
        ("/admin/workers/drain", {"url": "http://a:1"}, "is_draining"),
        ("/admin/workers/drain", {"url": "http://a:1", "is_draining": "yes"}, "Expected `bool`"),
        ("/modules", {"name": "a"}, "`path`"),
    ],
)
def test_a_body_that_cannot_be_used_changes_nothing(path, body, says):
    async def scenario():
        async with running_system(admin_api_key="k") as system:
            answer = await system.admin("POST", path, body)
            assert answer.status in (400, 413) and says in answer.error, answer.error
            assert len(system.router.pool.urls) == 3
            answer = await system.admin("POST", "/admin/workers/drain", {"url": "http://a:1", "is_draining": True})
            assert answer.status == 404 and system.prefill[0].url in answer.error
            assert (await system.admin("DELETE", "/admin/workers")).status == 400

    run(scenario())


def test_a_router_may_begin_with_nobody():
    async def scenario():
        async with running_system(configured=False, wait=False, admin_api_key="k") as system:
            assert (await system.get("/livez")).status == 200
            for path in ("/readyz", "/health"):
                answer = await system.get(path)
                assert answer.status == 503
                assert answer.json()["missing"] == ["no decode module is known: no worker has named one yet"]
            assert (await system.get("/v1/models")).json()["data"] == []
            assert (await system.chat("planner")).status == 404
            assert (await system.get("/metrics")).status == 200
            for worker in (*system.prefill, *system.decode["coder"]):
                await system.admin("POST", "/admin/workers", {"url": worker.url})
            await system.ready()
            assert (await system.chat("coder")).status == 200
            assert (await system.get("/model_info")).status == 200

    run(scenario())


def test_one_dead_module_does_not_make_the_router_unready():
    async def scenario():
        async with running_system() as system:
            await system.decode["coder"][0].stop()
            await until(lambda: bool(system.router.pool.missing()))
            ready = await system.get("/readyz")
            assert ready.status == 200 and ready.json()["modules"] == ["planner"]
            assert "'coder'" in ready.json()["missing"][0]
            assert (await system.get("/health")).status == 503
            await system.prefill[0].stop()
            await until(lambda: not system.router.pool.served_modules())
            unready = await system.get("/readyz")
            assert unready.status == 503 and "no prefill worker is ready" in json.dumps(unready.json())
            assert (await system.get("/livez")).status == 200

    run(scenario())


def test_a_router_that_stops_is_alive_and_not_ready():
    async def scenario():
        async with running_system() as system:
            system.router.dispatcher.refuse_new()
            unready = await system.get("/readyz")
            assert unready.status == 503 and unready.json()["missing"] == ["the router is stopping"]
            assert (await system.get("/livez")).status == 200

    run(scenario())


def test_a_module_of_the_flags_whose_last_worker_was_removed_for_good_is_none_any_more():
    async def scenario():
        async with running_system(admin_api_key="k") as system:
            coder = system.decode["coder"][0]
            path = f"/admin/workers?url={coder.url}"
            refused = await system.admin("DELETE", f"{path}&for_good=perhaps")
            assert refused.status == 400 and "wanted true or false" in refused.error
            coder.behave = "slow:0.3"
            running = asyncio.create_task(system.chat("coder"))
            await until(lambda: coder.seen)
            for _ in range(2):  # as whoever waits for its end asks
                assert (await system.admin("DELETE", f"{path}&for_good=true")).status == 202
            assert "coder" in system.router.pool.modules, "while a request is under way"
            assert (await running).status == 200
            await until(lambda: coder.url not in system.router.pool)
            assert (await system.admin("DELETE", f"{path}&for_good=true")).status == 404
            assert (await system.chat("coder")).status == 404
            assert (await system.get("/health")).status == 200
            assert (await system.admin("POST", "/admin/workers", {"url": coder.url})).status == 201
            await system.ready()
            coder.behave = "ok"
            assert (await system.chat("coder")).status == 200
            # And without the word it is the configuration's again.
            assert (await system.admin("DELETE", path)).status == 202
            assert (await system.chat("coder")).status == 503

    run(scenario())


def test_removing_one_of_several_workers_for_good_leaves_the_module():
    async def scenario():
        async with running_system(admin_api_key="k", decode={"coder": 2}) as system:
            first, second = system.decode["coder"]
            assert (await system.admin("DELETE", f"/admin/workers?url={first.url}&for_good=true")).status == 202
            assert (await system.chat("coder")).status == 200 and second.seen
            assert (await system.admin("DELETE", f"/admin/workers?url={second.url}&for_good=true")).status == 202
            assert "coder" not in system.router.pool.modules

    run(scenario())
