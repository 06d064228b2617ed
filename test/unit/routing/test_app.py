"""The router's other endpoints, its checks of requests, and the life of its workers as a client sees it."""

import asyncio
import contextlib
import dataclasses
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sglang_prefillshare.protocol import Role
from sglang_prefillshare.routing.workers import WorkerPool
from test.unit.routing.routing_harness import STREAM, WHOLE, run, running_system, until

REFUSED = [
    ("/v1/chat/completions", b"{oops", 400, "not JSON"),
    ("/v1/chat/completions", b"\xff\xfe", 400, "not JSON"),
    ("/v1/chat/completions", [1], 400, "array"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, 400, "planner, coder"),
    ("/v1/chat/completions", {"model": "base", "messages": [{}]}, 404, "planner, coder"),
    ("/v1/chat/completions", {"model": 3, "messages": [{}]}, 400, "number"),
    ("/v1/chat/completions", {"model": "coder"}, 400, "messages"),
    ("/v1/chat/completions", {"model": "coder", "messages": []}, 400, "empty"),
    ("/v1/chat/completions", {"model": "coder", "messages": ["x"]}, 400, "messages[0]"),
    ("/v1/chat/completions", {"model": "coder", "messages": [{"role": "user"}], "n": 129}, 400, "n is 129"),
    ("/v1/completions", {"model": "coder", "prompt": ["a"] * 9, "n": 128}, 400, "1152 answers, wanted at most 1024"),
    ("/v1/completions", {"model": "coder", "prompt": "a", "n": 0}, 400, "n is 0"),
    ("/v1/chat/completions", {"model": "coder", "messages": [{}], "stream": "yes"}, 400, "stream"),
    ("/v1/completions", {"model": "coder"}, 400, "no prompt"),
    ("/v1/completions", {"model": "coder", "prompt": ""}, 400, "empty"),
    ("/v1/completions", {"model": "coder", "prompt": []}, 400, "empty"),
    ("/v1/completions", {"model": "coder", "prompt": ["a", ""]}, 400, "prompt[1]"),
    ("/v1/completions", {"model": "coder", "prompt": ["a", 1]}, 400, "prompt[1]"),
    ("/v1/completions", {"model": "coder", "prompt": "a", "echo": True, "logprobs": 1}, 400, "base's"),
    ("/generate", {"text": "x"}, 400, "planner, coder"),
    ("/generate", {"model": "coder"}, 400, "text or input_ids"),
    ("/generate", {"model": "coder", "text": "a", "input_ids": [1]}, 400, "both"),
    ("/generate", {"model": "coder", "input_ids": [1, -1]}, 400, "token id"),
    ("/generate", {"model": "coder", "input_ids": [[1], []]}, 400, "input_ids[1]"),
    ("/generate", {"model": "coder", "input_embeds": [[0.1]]}, 400, "input_embeds"),
    ("/generate", {"model": "coder", "text": "a", "sampling_params": {"n": 2.5}}, 400, "n is 2.5"),
    ("/generate", {"model": "coder", "text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 3}]}, 400, "the same"),
    ("/generate", {"model": "coder", "text": "a", "rid": ["a", "b"]}, 400, "rid"),
    ("/generate", {"model": "coder", "text": ["a", "b"], "rid": ["a", "a"]}, 400, "rid"),
    ("/generate", {"model": "coder", "text": "a", "return_logprob": True, "logprob_start_len": 0}, 400, "base's"),
    ("/m/nobody/generate", {"text": "a"}, 404, "planner, coder"),
]


def test_what_cannot_be_served_is_refused_with_the_reason():
    async def scenario():
        async with running_system() as system:
            for path, body, status, says in REFUSED:
                answer = await system.post(path, body)
                assert (answer.status, says in answer.error) == (status, True), (path, body, answer.body)
                assert answer.json()["error"].keys() == {"object", "message", "type", "param", "code"}
                call = await system.last_call()
                assert call["outcome"] == "rejected" and call["status"] == status
            assert all(not worker.seen for worker in system.workers)

    run(scenario())


def test_the_frontend_finds_a_module_under_its_prefix():
    """What SGLang's RuntimeEndpoint asks of a base URL; it never sends a model."""

    async def scenario():
        async with running_system() as system:
            base = "/m/coder"
            model_info = (await system.get(base + "/get_model_info")).json()
            assert model_info["model_path"] == "/models/coder"
            assert (await system.get(base + "/model_info")).json() == model_info
            assert (await system.get(base + "/server_info")).json()["served_model_name"] == "coder"
            assert (await system.get(base + "/get_server_info")).status == 200
            assert (await system.get(base + "/health")).status == 200
            assert [card["id"] for card in (await system.get(base + "/v1/models")).json()["data"]] == ["coder"]
            assert (await system.post(base + "/generate", {"text": "x"})).body == WHOLE
            assert (await system.post(base + "/generate", {"text": "x", "stream": True})).body == b"".join(STREAM)
            body = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
            assert (await system.post(base + "/v1/chat/completions", body)).body == WHOLE
            assert system.decode["coder"][0].seen[-1].body["model"] == "coder"
            assert (await system.post(base + "/v1/completions", {"prompt": "x"})).body == WHOLE
            assert not system.decode["planner"][0].seen
            assert (await system.post(base + "/flush_cache", {})).status == 200
            assert not system.decode["planner"][0].flushed
            assert len(system.prefill[0].flushed) == len(system.decode["coder"][0].flushed) == 1
            for path in ("/get_model_info", "/server_info", "/health", "/v1/models"):
                assert (await system.get("/m/nobody" + path)).status == 404

    run(scenario())


def test_a_module_name_may_contain_a_slash():
    async def scenario():
        async with running_system(decode={"org/coder": 1}) as system:
            assert (await system.post("/m/org/coder/generate", {"text": "x"})).status == 200
            assert (await system.get("/v1/models/org/coder")).json()["id"] == "org/coder"

    run(scenario())


def test_the_benchmark_finds_what_it_asks_for():
    """What sglang.benchmark.serving asks of --base-url."""

    async def scenario():
        async with running_system() as system:
            models = (await system.get("/v1/models")).json()
            assert models["object"] == "list"
            assert [card["id"] for card in models["data"]] == ["planner", "coder"]
            assert models["data"][0]["max_model_len"] == 8192
            assert (await system.get("/v1/models/planner")).json()["id"] == "planner"
            assert (await system.get("/v1/models/base")).status == 404
            assert (await system.get("/model_info")).json()["tokenizer_path"] == "/models/base"
            server_info = (await system.get("/server_info")).json()
            assert [entry["served_model_name"] for entry in server_info["decode"]] == ["planner", "coder"]
            assert "internal_states" in server_info["decode"][0]
            assert server_info["prefill"][0]["served_model_name"] == "base"
            assert (await system.post("/flush_cache?timeout=60.0", {})).status == 200
            assert [worker.flushed for worker in system.workers] == [["timeout=60.0"]] * 3
            # `--lora-name planner coder` puts the name into model and lora_path, on /generate only into the latter.
            body = {"text": "x", "lora_path": "coder", "return_logprob": False, "logprob_start_len": -1}
            assert (await system.post("/generate", body)).status == 200
            await system.chat("planner", lora_path="planner")
            for leg in (*system.prefill[0].seen, *system.decode["coder"][0].seen, *system.decode["planner"][0].seen):
                assert "lora_path" not in leg.body

    run(scenario())


def test_flush_cache_reports_a_worker_that_could_not_and_forgets_prefixes():
    async def scenario():
        async with running_system() as system:
            for model in ("planner", "coder"):
                await system.chat(model, messages=[{"role": "user", "content": "x" * 2000}])
            assert all(system.router.index.block_count(worker.url) > 0 for worker in system.workers)
            await system.post("/m/planner/flush_cache", {})
            held = [system.router.index.block_count(worker.url) > 0 for worker in system.workers]
            assert held == [False, False, True], "prefill's, planner's, coder's"
            system.decode["coder"][0].behave = "bad"
            answer = await system.post("/flush_cache", {})
            assert answer.status == 400
            assert answer.json()["failed"][0]["url"] == system.decode["coder"][0].url
            assert system.router.index.block_count(system.decode["coder"][0].url) == 0

    run(scenario())


def test_a_single_module_needs_no_name():
    async def scenario():
        async with running_system(decode={"planner": 1}) as system:
            assert (await system.post("/generate", {"text": "x"})).status == 200
            assert (await system.get("/get_model_info")).json()["model_path"] == "/models/planner"

    run(scenario())


def test_unknown_paths_and_methods_answer_in_the_same_shape():
    async def scenario():
        async with running_system() as system:
            answer = await system.get("/v1/nothing")
            assert answer.status == 404 and "/v1/nothing" in answer.error
            for limit in ("x", "9" * 5000):  # Python reads no number of over 4,300 digits
                assert (await system.get(f"/calls?limit={limit}")).status == 400

    run(scenario())


def test_metrics_count_requests_tokens_and_workers():
    async def scenario():
        async with running_system() as system:
            await system.chat("planner")
            await system.chat("planner", stream=True)
            await system.chat("nobody")
            chat = 'endpoint="/v1/chat/completions"'
            assert await system.metric(f'requests_total{{{chat},model="planner",outcome="ok"}}') == 2
            assert await system.metric(f'requests_total{{{chat},model="",outcome="rejected"}}') == 1
            assert await system.metric('prefill_tokens_total{model="planner"}') == 80
            assert await system.metric('cached_tokens_total{model="planner"}') == 64
            assert await system.metric('cross_model_cached_tokens_total{model="planner"}') == 32
            assert await system.metric('e2e_seconds_count{model="planner"}') == 2
            assert await system.metric('decisions_total{reason="least_loaded",role="decode"}') == 2
            assert await system.metric('inflight_requests{model="planner"}') == 0
            ready = f'worker_ready{{model="",role="prefill",worker="{system.prefill[0].url}"}}'
            assert await system.metric(ready) == 1

    run(scenario())


HANDOFFS = """# HELP sglang:num_running_reqs Theirs.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{model_name="x"}} 7.0
# HELP prefillshare_handoffs_total Handoffs.
# TYPE prefillshare_handoffs_total counter
prefillshare_handoffs_total{{side="{side}",outcome="ok"}} {count}
# HELP prefillshare_handoff_seconds Time of a handoff.
# TYPE prefillshare_handoff_seconds histogram
prefillshare_handoff_seconds_bucket{{side="{side}",outcome="ok",le="0.1"}} {count}
prefillshare_handoff_seconds_bucket{{side="{side}",outcome="ok",le="+Inf"}} {count}
prefillshare_handoff_seconds_sum{{side="{side}",outcome="ok"}} 0.5
prefillshare_handoff_seconds_count{{side="{side}",outcome="ok"}} {count}
# HELP prefillshare_pages_leased Pages.
# TYPE prefillshare_pages_leased gauge
prefillshare_pages_leased{{side="{side}",pid="1"}} 2.0
prefillshare_pages_leased{{side="{side}",pid="2"}} 3.0
"""


def missing(worker, role: str, model: str) -> str:
    return f'worker_metrics_missing{{model="{model}",role="{role}",worker="{worker.url}"}}'


def test_metrics_have_the_sums_of_the_workers_handoffs():
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 2, "coder": 1}, worker_api_key="k") as system:
            for worker, count in zip(system.prefill, (1, 2), strict=True):
                worker.metrics = HANDOFFS.format(side="prefill", count=count)
            for worker, count in zip(system.decode["planner"], (10, 20), strict=True):
                worker.metrics = HANDOFFS.format(side="decode", count=count)
            system.decode["coder"][0].metrics = HANDOFFS.format(side="decode", count=400)
            page = (await system.get("/metrics")).body.decode()
            lines = page.splitlines()
            for line in (
                'prefillshare_handoffs_total{model="base",outcome="ok",side="prefill"} 3.0',
                'prefillshare_handoffs_total{model="planner",outcome="ok",side="decode"} 30.0',
                'prefillshare_handoffs_total{model="coder",outcome="ok",side="decode"} 400.0',
                'prefillshare_handoff_seconds_bucket{le="0.1",model="planner",outcome="ok",side="decode"} 30.0',
                'prefillshare_handoff_seconds_sum{model="planner",outcome="ok",side="decode"} 1.0',
                'prefillshare_handoff_seconds_count{model="planner",outcome="ok",side="decode"} 30.0',
                'prefillshare_pages_leased{model="base",side="prefill"} 10.0',
                "# TYPE prefillshare_handoffs_total counter",
            ):
                assert lines.count(line) == 1, line
            assert "sglang:" not in page
            declared = [line.split()[1:3] for line in lines if line.startswith("#")]
            assert all(declared.count(entry) == 1 for entry in declared)
            families = list(text_string_to_metric_families(page))
            assert len({family.name for family in families}) == len(families)
            assert system.prefill[0].metrics_headers[0]["Authorization"] == "Bearer k"
            assert await system.metric(missing(system.prefill[0], "prefill", "")) == 0

    run(scenario())


def test_workers_without_metrics_are_left_out_and_named():
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 5}, poll_timeout_s=0.2) as system:
            good, none, hanging, broken, garbage = system.decode["planner"]
            other_base, down = system.prefill
            for worker in system.workers:
                worker.metrics = HANDOFFS.format(side="decode", count=1)
            none.metrics = None
            hanging.metrics_behave, broken.metrics_behave = "hang", "broken"
            garbage.metrics = 'prefillshare_handoffs_total{side="decode'
            other_base.info = dataclasses.replace(other_base.info, base_fingerprint="base-2")
            await down.stop()
            await until(lambda: system.router.pool[down.url].verdict.status == "down")
            other_base.info = dataclasses.replace(other_base.info, transfer_backend="other", boundary="other")
            await until(lambda: system.router.pool[other_base.url].verdict.status == "refused")
            async with asyncio.timeout(5):  # one that hangs holds the page up no longer than a poll
                lines = (await system.get("/metrics")).body.decode().splitlines()
            counted = [line for line in lines if line.startswith("prefillshare_handoffs_total")]
            assert counted == [
                'prefillshare_handoffs_total{model="base",outcome="ok",side="decode"} 1.0',
                'prefillshare_handoffs_total{model="planner",outcome="ok",side="decode"} 1.0',
            ]
            for worker, is_missing in ((good, 0), (none, 1), (hanging, 1), (broken, 1), (garbage, 1)):
                assert await system.metric(missing(worker, "decode", "planner")) == is_missing
            assert await system.metric(missing(other_base, "prefill", "")) == 0
            assert await system.metric(missing(down, "prefill", "")) == 1

    run(scenario())


def test_the_call_log_is_bounded():
    async def scenario():
        async with running_system(call_log_size=3) as system:
            for i in range(5):
                await system.chat(rid=f"r{i}")
            assert [call["rid"] for call in (await system.get("/calls")).json()["calls"]] == ["r2", "r3", "r4"]
            assert [call["rid"] for call in (await system.get("/calls?limit=1")).json()["calls"]] == ["r4"]

    run(scenario())


# -------------------------------------------------------------------------------------------- worker health


def test_health_says_what_is_missing_and_recovers():
    async def scenario():
        async with running_system() as system:
            assert (await system.get("/health")).json()["status"] == "ok"
            await system.decode["coder"][0].stop()
            await until(lambda: bool(system.router.pool.missing()))
            answer = await system.get("/health")
            assert answer.status == 503
            assert "'coder'" in answer.json()["missing"][0] and "down" in answer.json()["missing"][0]
            assert (await system.get("/m/planner/health")).status == 200
            assert (await system.get("/m/coder/health")).status == 503
            assert (await system.chat("planner")).status == 200
            refused = await system.chat("coder")
            assert refused.status == 503 and "'coder'" in refused.error
            assert not system.prefill[0].seen[1:], "nothing is prefilled for a module that cannot answer"
            await system.decode["coder"][0].start()
            await system.ready()
            assert (await system.chat("coder")).status == 200

    run(scenario())


def test_a_worker_that_hangs_goes_down_and_its_legs_fail():
    async def scenario():
        async with running_system(poll_timeout_s=0.3) as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            decode.behave = prefill.behave = "hang"
            client = asyncio.create_task(system.chat())
            await asyncio.gather(prefill.arrived.wait(), decode.arrived.wait())
            prefill.info_behave = "hang"
            answer = await client
            assert answer.status == 503 and prefill.url in answer.error and "went down" in answer.error
            await until(lambda: decode.aborted != [])
            assert (await system.last_call())["outcome"] == "unavailable"
            assert await system.metric('legs_aborted_total{cause="worker_down",role="prefill"}') == 1
            states = {w["url"]: w["status"] for w in (await system.get("/workers")).json()["workers"]}
            assert states[prefill.url] == "down"
            prefill.info_behave = prefill.behave = decode.behave = "ok"
            await system.ready()
            assert (await system.chat()).status == 200
            system.assert_idle()

    run(scenario())


def test_the_router_ends_while_a_worker_hangs_even_if_a_cancelled_poll_goes_on(monkeypatch):
    """A poll that ran out of time as it was cancelled was seen to swallow that, in one of some twenty ends."""

    async def deaf(_pool, _worker, _session):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    async def scenario():
        async with running_system() as system:
            monkeypatch.setattr(WorkerPool, "poll", deaf)
            await asyncio.sleep(0.1)
            system.server.should_exit = True
            async with asyncio.timeout(5):
                await system.server_task

    run(scenario())


def test_fewer_misses_than_allowed_change_nothing():
    async def scenario():
        async with running_system(poll_misses_until_down=1000) as system:
            system.prefill[0].info_behave = "503"
            await until(lambda: system.router.pool.prefill[0].misses > 2)
            assert (await system.chat()).status == 200

    run(scenario())


def test_a_decode_worker_of_another_base_is_refused_and_named():
    async def scenario():
        def wrong(prefill, decode):
            decode["coder"][0].info = dataclasses.replace(decode["coder"][0].info, base_fingerprint="base-2")

        async with running_system(wait=False, prepare=wrong) as system:
            await until(lambda: len(system.router.pool.missing()) == 1)
            await asyncio.sleep(0.1)
            health = await system.get("/health")
            assert health.status == 503
            assert "base-2" in health.json()["not_ready"][0]["reason"]
            assert "base-1" in health.json()["not_ready"][0]["reason"]
            answer = await system.chat("coder")
            assert answer.status == 503 and "refused" in answer.error and "base-2" in answer.error
            assert not system.decode["coder"][0].seen
            assert (await system.chat("planner")).status == 200

    run(scenario())


def test_a_prefill_worker_that_restarts_with_another_base_prefills_for_none_of_the_firsts_modules():
    async def scenario():
        async with running_system(prefill=3) as system:
            system.prefill[0].info = dataclasses.replace(system.prefill[0].info, base_fingerprint="base-2")
            await until(lambda: system.router.pool.prefill[0].base == "base-2")
            for _ in range(4):
                assert (await system.chat()).status == 200
            assert not system.prefill[0].seen
            told = (await system.get("/workers")).json()
            assert [worker["base_fingerprint"] for worker in told["workers"][:2]] == ["base-2", "base-1"]
            assert told["base_fingerprint"] == "base-1"
            assert told["bases"] == [
                {"base_fingerprint": "base-1", "prefill_ready": 2, "modules": ["planner", "coder"]},
                {"base_fingerprint": "base-2", "prefill_ready": 1, "modules": []},
            ]

    run(scenario())


def test_two_bases_are_served_side_by_side():
    """A new base comes while the old one serves: each module is prefilled by its own, and one is retried only there."""

    async def scenario():
        def other(prefill, decode):
            for worker in (prefill[1], *decode["coder"]):
                worker.info = dataclasses.replace(worker.info, base_fingerprint="base-2")

        async with running_system(prefill=2, prepare=other) as system:
            for _ in range(3):
                for model in ("planner", "coder"):
                    answer = await system.chat(model, headers={"x-smg-routing-key": "one session of both"})
                    assert answer.status == 200
            assert [len(worker.seen) for worker in system.workers] == [3, 3, 3, 3]
            assert {seen.headers["x-smg-routing-key"] for seen in system.prefill[1].seen} == {"coder"}
            assert await system.metric('decisions_total{reason="session",role="prefill"}') == 4
            health = (await system.get("/health")).json()
            assert sorted(base["modules"] for base in health["bases"]) == [["coder"], ["planner"]]
            await system.prefill[1].stop()
            await until(lambda: "no prefill worker of the base base-2" in str(system.router.pool.missing(["coder"])))
            refused = await system.chat("coder")
            assert refused.status == 503 and "base-2" in refused.error
            assert (await system.chat("planner")).status == 200
            assert (await system.get("/readyz")).status == 200 and (await system.get("/health")).status == 503

    run(scenario())


@pytest.mark.parametrize(
    ("info_behave", "status", "says"),
    [("404", "refused", "role"), ("garbage", "refused", "not JSON"), ("503", "starting", "503")],
)
def test_a_worker_without_a_usable_description_is_not_used(info_behave, status, says):
    async def scenario():
        def odd(prefill, decode):
            decode["coder"][0].info_behave = info_behave

        async with running_system(wait=False, prepare=odd) as system:
            await until(lambda: says in (system.router.pool.decode["coder"][0].verdict.reason or ""))
            worker = (await system.get("/workers")).json()["workers"][2]
            assert worker["status"] == status
            assert worker["info"] is None
            assert (await system.chat("coder")).status == 503

    run(scenario())


def test_polls_and_aborts_carry_the_workers_api_key():
    async def scenario():
        async with running_system(worker_api_key="k") as system:
            assert system.prefill[0].poll_headers[0]["Authorization"] == "Bearer k"
            assert "k" not in (await system.get("/workers")).body.decode().split('"')

    run(scenario())


def test_worker_descriptions_are_shown_as_they_were_told():
    async def scenario():
        async with running_system() as system:
            workers = (await system.get("/workers")).json()
            assert workers["base_fingerprint"] == "base-1"
            assert workers["workers"][0]["info"] == json.loads(json.dumps(system.prefill[0].info.to_json()))
            assert [w["role"] for w in workers["workers"]] == [Role.PREFILL, Role.DECODE, Role.DECODE]

    run(scenario())
