"""Which workers fit together."""

from dataclasses import replace

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.prefix_index import PrefixIndex
from sglang_prefillshare.routing.workers import Observation, Status, Verdict, WorkerPool, judge
from test.unit.routing.routing_harness import info


def seen(url: str, role: Role = Role.PREFILL, model: str | None = None, **changes) -> Observation:
    told = info(role, model or "base", **changes)
    return Observation(url=url, role=role, model=model, info=told, problem=None, lost=None, was_seen=True)


def statuses(*workers: Observation, incumbent: str | None = None) -> dict[str, Status]:
    return {url: verdict.status for url, verdict in judge(workers, incumbent=incumbent)[1].items()}


def test_workers_of_one_base_are_ready():
    decode = seen("d", Role.DECODE, "planner")
    assert statuses(seen("p"), decode) == {"p": Status.READY, "d": Status.READY}


def test_the_majority_of_prefill_workers_names_the_base():
    workers = [seen("p0", base_fingerprint="odd"), seen("p1"), seen("p2")]
    reference, _ = judge(workers, incumbent=None)
    assert reference == "base-1"
    assert statuses(*workers) == {"p0": Status.REFUSED, "p1": Status.READY, "p2": Status.READY}


def test_among_equals_the_incumbent_stays_and_otherwise_the_first_wins():
    workers = [seen("p0", base_fingerprint="a"), seen("p1", base_fingerprint="b")]
    assert judge(workers, incumbent=None)[0] == "a"
    assert judge(workers, incumbent="b")[0] == "b"
    assert judge(workers, incumbent="gone")[0] == "a"


def test_the_reference_outlives_the_prefill_pool():
    gone = replace(seen("p"), lost="does not answer")
    right, wrong = seen("d0", Role.DECODE, "planner"), seen("d1", Role.DECODE, "coder", base_fingerprint="x")
    assert statuses(gone, right, wrong, incumbent="base-1") == {
        "p": Status.DOWN,
        "d0": Status.READY,
        "d1": Status.REFUSED,
    }
    assert statuses(gone, right)["d0"] is Status.STARTING


def test_each_misfit_is_refused_with_both_values():
    def reason(worker: Observation) -> str:
        verdict = judge([seen("p"), worker], incumbent=None)[1][worker.url]
        assert verdict.status is Status.REFUSED and verdict.reason
        return verdict.reason

    decode = seen("d", Role.DECODE, "planner")
    assert decode.info is not None
    told = decode.info
    assert "prefill" in reason(replace(decode, info=replace(told, role=Role.PREFILL)))
    assert "other-rule" in reason(replace(decode, info=replace(told, boundary="other-rule")))
    assert "'coder'" in reason(replace(decode, info=replace(told, model="coder")))
    assert "base-2" in reason(replace(decode, info=replace(told, base_fingerprint="base-2")))
    assert "'nixl'" in reason(replace(decode, info=replace(told, transfer_backend="nixl")))
    assert "bootstrap_port" in reason(seen("p2", bootstrap_port=None))
    unable = replace(told, handoff_failure="the pool is closed; choose nixl")
    assert reason(replace(decode, info=unable)) == "it can hand no KV over: the pool is closed; choose nixl"
    assert reason(replace(decode, info=None, problem="it is odd")) == "it is odd"


def test_a_misfit_prefill_worker_has_no_vote():
    misfit = [seen(f"p{i}", base_fingerprint="b", boundary="other-rule") for i in range(3)]
    assert judge([*misfit, seen("p9")], incumbent=None)[0] == "base-1"


def test_a_worker_in_a_container_of_its_own_is_refused_before_a_request_comes():
    prefill, decode = seen("p", pool_space="boot pid:[1]"), seen("d", Role.DECODE, "planner", pool_space="boot pid:[2]")
    other = seen("p2", pool_space="boot pid:[2]")
    verdicts = judge([prefill, decode, other], incumbent=None)[1]
    assert [verdicts[url].status for url in ("p", "d", "p2")] == [Status.READY, Status.REFUSED, Status.REFUSED]
    for part in ("boot pid:[1]", "boot pid:[2]", "--pid host --ipc host", "--disaggregation-transfer-backend nixl"):
        assert part in str(verdicts["d"].reason)
    assert statuses(other, decode)["d"] is Status.READY


def test_gpus_that_are_no_peers_are_refused_before_a_request_comes():
    """What a worker does not see of the other's GPU it finds out when it maps the pool."""
    on = {"gpu": "A", "gpus_in_reach": {"A": True, "B": False}}
    beside = {"gpu": "B", "gpus_in_reach": {"A": False, "B": True}}
    prefill, far = seen("p", **on), seen("d", Role.DECODE, "planner", **beside)
    verdict = judge([prefill, far], incumbent=None)[1]["d"]
    assert verdict.status is Status.REFUSED
    for part in ("its GPU B cannot read from GPU A", "topo -p2p r", "--disaggregation-transfer-backend nixl"):
        assert part in str(verdict.reason)
    for near in (on, {"gpu": "B", "gpus_in_reach": {"A": True, "B": True}}, {"gpu": "B", "gpus_in_reach": {"B": True}}):
        assert statuses(prefill, seen("d", Role.DECODE, "planner", **near))["d"] is Status.READY
    assert statuses(prefill, seen("d", Role.DECODE, "planner", gpu="B", gpus_in_reach="?"))["d"] is Status.READY


def test_a_worker_with_adapters_fits_as_long_as_it_serves_one_of_its_modules():
    def adapters(*served: str) -> Observation:
        told = info(Role.DECODE, "base", modules=list(served))
        worker = Observation("d", Role.DECODE, "planner, coder", told, None, None, True, modules=("planner", "coder"))
        return worker

    for served in (("planner", "coder"), ("coder",)):
        assert statuses(seen("p"), adapters(*served))["d"] == Status.READY
    _, verdicts = judge([seen("p"), adapters("reviewer")], incumbent=None)
    assert verdicts["d"].status == Status.REFUSED
    assert verdicts["d"].reason is not None and "serves the modules reviewer" in verdicts["d"].reason


def test_a_module_that_a_worker_has_not_is_not_served_by_it():
    config = RouterConfig(prefill=["http://p"], decode={"planner": ["http://d"], "coder": ["http://d"]})
    pool = WorkerPool(config, index=PrefixIndex(capacity_blocks=16))
    [worker] = pool.decode["planner"]
    assert pool.decode["coder"] == [worker] and [each.url for each in pool] == ["http://p", "http://d"]
    worker.info = info(Role.DECODE, "base", modules=["planner"])
    worker.verdict = Verdict(Status.READY, None)
    assert worker.is_ready_for("planner") and not worker.is_ready_for("coder")
    assert [len(pool.decode_snapshots(name, [])) for name in ("planner", "coder")] == [1, 0]
