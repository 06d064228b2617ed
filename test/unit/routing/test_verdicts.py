"""Which workers fit together, and which base a module is bound to."""

from dataclasses import replace
from itertools import permutations

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.verdicts import Bases, Observation, Status, judge
from test.unit.routing.routing_harness import info


def seen(url: str, role: Role = Role.PREFILL, model: str | None = None, **changes) -> Observation:
    told = info(role, model or "base", **changes)
    modules = (model,) if role is Role.DECODE and model is not None else ()
    return Observation(url, role, model, told, problem=None, lost=None, was_seen=True, modules=modules)


def statuses(*workers: Observation, before: Bases | None = None) -> dict[str, Status]:
    return {url: verdict.status for url, verdict in judge(workers, before=before).verdicts.items()}


def refusal(url: str, *workers: Observation, before: Bases | None = None) -> str:
    verdict = judge(workers, before=before).verdicts[url]
    assert verdict.status is Status.REFUSED and verdict.reason
    return verdict.reason


def test_workers_of_one_base_are_ready():
    decode = seen("d", Role.DECODE, "planner")
    assert statuses(seen("p"), decode) == {"p": Status.READY, "d": Status.READY}


def test_each_base_has_a_pool_of_its_own_whatever_the_majority_holds():
    old, new = [seen("p0"), seen("p1")], seen("p2", base_fingerprint="base-2")
    planner = seen("d0", Role.DECODE, "planner")
    coder = seen("d1", Role.DECODE, "coder", base_fingerprint="base-2")
    found = judge([*old, new, planner, coder])
    assert set(found.verdicts) == {"p0", "p1", "p2", "d0", "d1"}
    assert {verdict.status for verdict in found.verdicts.values()} == {Status.READY}
    assert found.bases.known == ("base-1", "base-2")
    assert found.bases.of_module == {"planner": "base-1", "coder": "base-2"}


def test_bases_stay_in_the_order_in_which_they_were_seen_until_nobody_names_them():
    a, b = seen("p0", base_fingerprint="a"), seen("p1", base_fingerprint="b")
    assert judge([a, b]).bases.known == ("a", "b")
    assert judge([a, b], before=Bases(known=("b", "gone"))).bases.known == ("b", "a")


def test_a_module_of_two_bases_belongs_to_the_first_and_the_other_worker_is_refused():
    bases = [seen("p0"), seen("p1", base_fingerprint="base-2")]
    first = seen("d0", Role.DECODE, "planner")
    second = seen("d1", Role.DECODE, "planner", base_fingerprint="base-2")
    reason = refusal("d1", *bases, first, second)
    for part in ("base-2", "base-1", "'planner'", "another name"):
        assert part in reason
    before = judge([*bases, second]).bases
    assert before.of_module == {"planner": "base-2"}
    assert "'planner' is served on base-2" in refusal("d0", *bases, first, second, before=before), "seen first"


def unasked(worker: Observation) -> Observation:
    return replace(worker, info=None, was_seen=False)


def test_a_worker_is_not_refused_for_its_base_before_every_prefill_worker_was_asked():
    """A router that starts hears of one prefill worker first."""
    decode = seen("d", Role.DECODE, "coder", base_fingerprint="base-2")
    late = seen("p1", base_fingerprint="base-2")
    assert statuses(seen("p0"), unasked(late), decode)["d"] is Status.STARTING
    assert statuses(seen("p0"), replace(unasked(late), role=None), decode)["d"] is Status.STARTING
    assert statuses(seen("p0"), late, decode)["d"] is Status.READY
    assert statuses(seen("p0"), replace(unasked(late), lost="no answer"), decode)["d"] is Status.REFUSED
    waits = unasked(seen("d1", Role.DECODE, "planner"))
    assert statuses(seen("p0"), decode, waits)["d"] is Status.REFUSED, "it will bring no base"


def test_who_answers_first_does_not_decide_the_base_of_a_module():
    """Whatever the order of the first answers, the bases end as if all had come at once."""
    workers = [
        seen("p0"),
        seen("p1", base_fingerprint="base-2"),
        seen("d0", Role.DECODE, "planner"),
        seen("d1", Role.DECODE, "planner", base_fingerprint="base-2"),
    ]
    for order in permutations(range(4)):
        bases = Bases()
        for count in range(1, 5):
            now = [worker if place in order[:count] else unasked(worker) for place, worker in enumerate(workers)]
            bases = judge(now, before=bases).bases
        assert bases.of_module == {"planner": "base-1"} and not bases.tentative, order


def test_a_module_that_is_served_stays_where_it_is_when_an_earlier_worker_comes_back_or_another_joins():
    bases = [seen("p0"), seen("p1", base_fingerprint="base-2")]
    first = seen("d0", Role.DECODE, "planner")
    second = seen("d1", Role.DECODE, "planner", base_fingerprint="base-2")
    absent = replace(unasked(first), lost="does not answer")
    before = judge([*bases, absent, second]).bases
    assert before.of_module == {"planner": "base-2"}
    joins = Observation("d2", None, None, None, None, None, was_seen=False)
    for now in ([first, second], [first, second, joins]):
        before = judge([*bases, *now], before=before).bases
        assert before.of_module == {"planner": "base-2"}


def test_a_base_that_prefill_holds_now_comes_before_one_that_it_held():
    old, new = seen("p0"), seen("p1", base_fingerprint="base-2")
    first = seen("d0", Role.DECODE, "planner")
    second = seen("d1", Role.DECODE, "planner", base_fingerprint="base-2")
    before = judge([old, new, first, second]).bases
    assert before.of_module == {"planner": "base-1"}
    for gone in (replace(old, lost="does not answer"), replace(old, is_draining=True)):
        found = judge([gone, new, first, second], before=before)
        assert found.bases.of_module == {"planner": "base-2"} and found.verdicts["d1"].status is Status.READY
        back = judge([old, new, first, second], before=found.bases)
        assert back.bases.of_module == {"planner": "base-2"}, "it serves there already"
    assert judge([replace(old, lost="x"), first, second], before=before).bases.of_module == {"planner": "base-1"}


def test_a_module_goes_over_to_another_base_when_its_last_worker_drains_or_is_lost():
    bases = [seen("p0"), seen("p1", base_fingerprint="base-2")]
    old, new = seen("d0", Role.DECODE, "planner"), seen("d1", Role.DECODE, "planner", base_fingerprint="base-2")
    before = judge([*bases, old]).bases
    for gone in (replace(old, is_draining=True), replace(old, lost="does not answer")):
        assert statuses(*bases, gone, new, before=before)["d1"] is Status.READY
    assert judge([*bases, replace(old, lost="x")], before=before).bases.of_module == {"planner": "base-1"}
    assert judge([*bases, seen("d2", Role.DECODE, "coder")], before=before).bases.of_module == {"coder": "base-1"}


def test_a_module_is_bound_where_it_can_be_served():
    nowhere = seen("d0", Role.DECODE, "planner", base_fingerprint="base-9")
    somewhere = seen("d1", Role.DECODE, "planner")
    assert statuses(seen("p"), nowhere, somewhere) == {
        "p": Status.READY,
        "d0": Status.REFUSED,
        "d1": Status.READY,
    }


def test_of_a_worker_with_several_modules_only_the_strange_ones_are_kept_back():
    bases = [seen("p0"), seen("p1", base_fingerprint="base-2")]
    told = info(Role.DECODE, "base", modules=["planner", "coder"], base_fingerprint="base-2")
    both = Observation("d1", None, None, told, None, None, True, modules=("planner", "coder"))
    found = judge([*bases, seen("d0", Role.DECODE, "planner"), both])
    assert found.verdicts["d1"].status is Status.READY
    assert found.strangers["d1"] == {"planner"} and not found.strangers["d0"]


def test_a_base_outlives_its_prefill_workers():
    gone = replace(seen("p"), lost="does not answer")
    right, wrong = seen("d0", Role.DECODE, "planner"), seen("d1", Role.DECODE, "coder", base_fingerprint="x")
    assert statuses(gone, right, wrong, before=Bases(known=("base-1",))) == {
        "p": Status.DOWN,
        "d0": Status.READY,
        "d1": Status.REFUSED,
    }
    assert statuses(gone, right)["d0"] is Status.STARTING


def test_each_misfit_is_refused_with_both_values():
    def reason(worker: Observation) -> str:
        return refusal(worker.url, seen("p"), worker)

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


def test_a_misfit_prefill_worker_makes_no_base_known():
    misfit = [seen(f"p{i}", base_fingerprint="b", boundary="other-rule") for i in range(3)]
    assert judge([*misfit, seen("p9")]).bases.known == ("base-1",)


def test_a_member_that_nothing_is_wanted_of_is_judged_by_what_it_says():
    def member(role: Role, model: str, **changes) -> Observation:
        return Observation("d", None, None, info(role, model, **changes), None, None, True, modules=(model,))

    assert statuses(seen("p"), member(Role.DECODE, "planner"))["d"] is Status.READY
    assert statuses(seen("p"), member(Role.PREFILL, "base"))["d"] is Status.READY
    assert "needs no router" in refusal("d", seen("p"), member(Role.UNIFIED, "base"))
    for odd in ("", "a b", "a?x"):
        assert "URL paths" in refusal("d", seen("p"), member(Role.DECODE, odd))
        assert "URL paths" in refusal("d", seen("p"), member(Role.DECODE, "base", modules=["coder", odd]))


def test_a_worker_in_a_container_of_its_own_is_refused_before_a_request_comes():
    prefill, decode = seen("p", pool_space="boot pid:[1]"), seen("d", Role.DECODE, "planner", pool_space="boot pid:[2]")
    other = seen("p2", pool_space="boot pid:[2]")
    verdicts = judge([prefill, decode, other]).verdicts
    assert [verdicts[url].status for url in ("p", "d", "p2")] == [Status.READY, Status.REFUSED, Status.REFUSED]
    for part in ("boot pid:[1]", "boot pid:[2]", "--pid host --ipc host", "--disaggregation-transfer-backend nixl"):
        assert part in str(verdicts["d"].reason)
    assert statuses(other, decode)["d"] is Status.READY


def test_gpus_that_are_no_peers_are_refused_before_a_request_comes():
    """What a worker does not see of the other's GPU it finds out when it maps the pool."""
    on = {"gpu": "A", "gpus_in_reach": {"A": True, "B": False}}
    beside = {"gpu": "B", "gpus_in_reach": {"A": False, "B": True}}
    prefill, far = seen("p", **on), seen("d", Role.DECODE, "planner", **beside)
    verdict = judge([prefill, far]).verdicts["d"]
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
    assert "serves the modules reviewer" in refusal("d", seen("p"), adapters("reviewer"))
