"""The pool: which workers serve a module, and what is said where none does."""

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import Member
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.verdicts import Status, Verdict
from sglang_prefillshare.routing.workers import WorkerPool
from test.unit.routing.routing_harness import info


def test_a_module_that_a_worker_has_not_is_not_served_by_it():
    config = RouterConfig(prefill=["http://p"], decode={"planner": ["http://d"], "coder": ["http://d"]})
    pool = WorkerPool(config, index=PrefixIndex(capacity_blocks=16))
    [worker] = pool.decode["planner"]
    assert pool.decode["coder"] == [worker] and [each.url for each in pool] == ["http://p", "http://d"]
    worker.info = info(Role.DECODE, "base", modules=["planner"])
    worker.verdict = Verdict(Status.READY, None)
    assert worker.is_ready_for("planner") and not worker.is_ready_for("coder")
    assert [len(pool.decode_snapshots(name, [])) for name in ("planner", "coder")] == [1, 0]


def pool_of(*told, **config) -> WorkerPool:
    """Members without a configuration, at http://w0, http://w1, ..., that said these things of themselves."""
    pool = WorkerPool(RouterConfig(admin_api_key="k", **config), index=PrefixIndex(capacity_blocks=16))
    for i, said in enumerate(told):
        worker = pool.join(Member(f"http://w{i}"))
        if said is not None:
            pool.seen(worker, said, None)
    return pool


def test_a_member_says_itself_what_it_is():
    pool = pool_of(
        info(Role.PREFILL, "base"),
        info(Role.DECODE, "planner"),
        info(Role.DECODE, "base", modules=["coder", "reviewer"]),
        None,
    )
    assert pool.modules == ["planner", "coder", "reviewer"]
    assert [worker.url for worker in pool.prefill] == ["http://w0"]
    assert [worker.status for worker in pool] == [Status.READY] * 3 + [Status.STARTING]
    assert pool.served_modules() == pool.modules
    [adapters] = pool.decode["coder"]
    pool.seen(adapters, info(Role.DECODE, "base", modules=["coder"]), None)
    assert pool.modules == ["planner", "coder"]
    pool.seen(adapters, info(Role.DECODE, "tester"), None)
    assert pool.modules == ["planner", "tester"]


def test_a_member_that_cannot_be_behind_a_router_brings_no_module():
    pool = pool_of(info(Role.PREFILL, "base"), info(Role.UNIFIED, "base", modules=["coder"]))
    assert pool.modules == [] and pool["http://w1"].status is Status.REFUSED


def test_a_module_goes_with_its_last_member_unless_it_is_configured():
    pool = pool_of(info(Role.PREFILL, "base"), info(Role.DECODE, "planner"), decode={"coder": ["http://c"]})
    pool.seen(pool["http://c"], info(Role.DECODE, "coder"), None)
    assert pool.modules == ["coder", "planner"]
    for url in ("http://c", "http://w1"):
        pool.forget(pool[url])
    assert pool.modules == ["coder"]
    assert pool.missing() == ["no worker of the decode module 'coder' is ready: there is none"]


def test_a_pool_that_nobody_is_in_says_so():
    assert pool_of().missing() == ["no decode module is known: no worker has named one yet"]
    assert pool_of(None).missing() == ["no decode module is known: no worker has named one yet"]


def test_a_member_of_the_configuration_must_be_what_it_says():
    pool = pool_of(prefill=["http://p"], decode={"coder": ["http://c"]})
    pool.seen(pool["http://p"], info(Role.DECODE, "coder"), None)
    assert pool["http://p"].reason == "its role is decode, and it is configured as prefill"
    pool.seen(pool["http://c"], info(Role.DECODE, "tester"), None)
    assert "it is configured for 'coder'" in str(pool["http://c"].reason)
    assert pool.modules == ["coder"]


def test_modules_are_prefilled_by_workers_of_their_own_base():
    pool = pool_of(
        info(Role.PREFILL, "base", max_prompt_bytes=100),
        info(Role.PREFILL, "base", base_fingerprint="base-2", max_prompt_bytes=200),
        info(Role.DECODE, "planner"),
        info(Role.DECODE, "coder", base_fingerprint="base-2"),
    )
    for module, url, most in (("planner", "http://w0", 100), ("coder", "http://w1", 200)):
        assert [worker.url for worker in pool.prefill_workers(module)] == [url]
        assert [snapshot.url for snapshot in pool.prefill_snapshots(module, [])] == [url]
        assert pool.limits(module).max_prompt_bytes == most
    assert pool.reference == "base-1" and pool.bases.known == ("base-1", "base-2")
    pool["http://w1"].is_drained = True
    assert pool.missing(["coder"]) == [
        "no prefill worker of the base base-2 is ready: http://w1 is draining (an administrator keeps new requests "
        "away from it)"
    ]
    assert pool.served_modules() == ["planner"]


def test_adapters_that_come_and_go_leave_what_a_worker_holds():
    pool = pool_of(info(Role.PREFILL, "base"), info(Role.DECODE, "base", modules=["coder"]))
    worker = pool["http://w1"]
    pool._index.insert(worker.url, [1, 2])
    pool.seen(worker, info(Role.DECODE, "base", modules=["coder", "tester"]), None)
    assert pool._index.block_count(worker.url) == 2
    pool.seen(worker, info(Role.DECODE, "base", modules=["coder", "tester"], max_total_tokens=1), None)
    assert pool._index.block_count(worker.url) == 0, "it was started anew"
