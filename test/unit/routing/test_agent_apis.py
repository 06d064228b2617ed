"""Anthropic's messages, OpenAI's responses, and several answers to a prompt: what becomes of them on both legs."""

import asyncio
import json

import pytest

from sglang_prefillshare.protocol import ADAPTER_HEADER, MODULE_HEADER, RID_HEADER, Role
from sglang_prefillshare.routing.answers import error_event_for
from sglang_prefillshare.routing.request import ClientRequest, Continued, Endpoint, canonical_prompts
from sglang_prefillshare.routing.responses import ResponseStore, whole_response
from test.unit.routing.routing_harness import WHOLE, info, run, running_system, until

ASK = {"model": "planner", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}

# ------------------------------------------------------------------------------------------------- messages


def test_messages_go_to_both_legs_under_one_name():
    async def scenario():
        async with running_system() as system:
            body = ASK | {
                "stop_sequences": ["x"],
                "temperature": 0.5,
                "system": "Be brief.",
                "tools": [{"name": "f", "input_schema": {}}],
                "thinking": {"type": "disabled"},
                "metadata": {"user_id": "session-1"},
                "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
            }
            spoofed = {RID_HEADER: "mine", "x-override-rid": "mine", "anthropic-version": "2023-06-01"}
            answer = await system.post("/v1/messages", body, headers=spoofed)
            assert (answer.status, answer.body) == (200, WHOLE)
            (p,), (d,) = system.prefill[0].seen, system.decode["planner"][0].seen
            assert p.path == d.path == "/v1/messages"
            for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
                assert p.body[name] == d.body[name]
            assert p.headers[RID_HEADER] == d.headers[RID_HEADER] != "mine"
            assert (await system.last_call())["worker_rids"] == [p.headers[RID_HEADER]]
            for leg in (p, d):
                assert "x-override-rid" not in leg.headers
                assert leg.headers["anthropic-version"] == "2023-06-01"
                assert leg.body["system"] == "Be brief." and leg.body["tools"] and leg.body["thinking"]
            assert p.headers[MODULE_HEADER] == "planner"
            assert (p.body["model"], p.body["max_tokens"], p.body["temperature"]) == ("base", 1, 0.0)
            assert "stop_sequences" not in p.body and p.body["output_config"] == {"effort": "low"}
            assert {key: d.body[key] for key in body} == body

    run(scenario())


def test_a_module_of_a_path_is_named_to_an_api_that_demands_it():
    async def scenario():
        async with running_system() as system:
            body = {key: ASK[key] for key in ("max_tokens", "messages")}
            assert (await system.post("/m/coder/v1/messages", body)).status == 200
            assert (await system.post("/m/coder/v1/responses", {"input": "x"})).status == 200
            assert [seen.body["model"] for seen in system.decode["coder"][0].seen] == ["coder", "coder"]

    run(scenario())


def test_a_messages_call_that_is_left_is_aborted_by_its_name():
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.behave, decode.behave = "bad", "hang"
            answer = await system.post("/v1/messages", ASK)
            assert answer.status == 400
            assert answer.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
            await until(lambda: decode.aborted == [decode.seen[0].headers[RID_HEADER]])

    run(scenario())


def test_the_users_id_is_the_session_and_marks_for_a_cache_do_not_change_a_prompt():
    def prompt(last_mark, *turns):
        content = [{"type": "text", "text": "x" * 40}]
        marked = [{**content[0], "cache_control": {"type": "ephemeral"}}]
        system = marked if last_mark == 0 else content
        messages = [{"role": "user", "content": marked if last_mark == i + 1 else content} for i in range(len(turns))]
        body = {"system": system, "messages": messages, "tools": [{"name": "f"}]}
        return canonical_prompts(Endpoint.MESSAGES, body)[0][0]

    assert prompt(2, 1, 2).startswith(prompt(1, 1)) and prompt(0, 1) == prompt(1, 1)

    async def scenario():
        async with running_system(prefill=2, decode={"planner": 2}) as system:
            for text in ("one", "two", "three"):
                body = ASK | {"messages": [{"role": "user", "content": text}], "metadata": {"user_id": "u"}}
                assert (await system.post("/v1/messages", body)).status == 200
            calls = (await system.get("/calls")).json()["calls"]
            assert [call["decision"] for call in calls[1:]] == ["session", "session"]

    run(scenario())


ERRORS = [
    ("/v1/messages", {"model": "planner", "max_tokens": 1}, "no messages"),
    ("/v1/messages", ASK | {"max_tokens": -1}, "max_tokens is -1"),
    ("/v1/messages", ASK | {"top_p": 7}, "top_p is 7"),
    ("/v1/messages", ASK | {"messages": "hi"}, "messages is a JSON string"),
    ("/v1/messages", ASK | {"stop_sequences": ["x"] * 40}, "at most 32"),
    ("/v1/messages", ASK | {"routed_dp_rank": 3}, "routed_dp_rank"),
    ("/v1/messages", ASK | {"output_config": {"format": "[" * 300}}, "deep"),
    ("/v1/responses", {"model": "planner"}, "no input"),
    ("/v1/responses", {"model": "planner", "input": ""}, "input is a JSON string"),
    ("/v1/responses", {"model": "planner", "input": 5}, "input is a JSON number"),
    ("/v1/responses", {"model": "planner", "input": "x", "background": True}, "background"),
    ("/v1/responses", {"model": "planner", "input": "x", "max_output_tokens": 1.5}, "max_output_tokens is 1.5"),
    ("/v1/responses", {"model": "planner", "input": "x", "max_output_tokens": 2}, "from 3"),
    ("/v1/responses", {"model": "planner", "input": "x", "top_k": 2**40}, "top_k"),
]


@pytest.mark.parametrize(("path", "body", "says"), ERRORS)
def test_a_wrong_request_is_refused_in_the_form_of_its_api(path, body, says):
    async def scenario():
        async with running_system() as system:
            answer = await system.post(path, body)
            assert answer.status == 400 and says in answer.error, answer.body
            told = answer.json()
            if path == "/v1/messages":
                assert told.keys() == {"type", "error"} and told["type"] == "error"
                assert told["error"].keys() == {"type", "message"}
                assert told["error"]["type"] == "invalid_request_error"
            else:
                assert told["error"].keys() == {"object", "message", "type", "param", "code"}
            assert not any(worker.seen for worker in system.workers)

    run(scenario())


def test_a_prompt_is_counted_by_a_worker_of_the_module_and_checked_first():
    async def scenario():
        async with running_system() as system:
            counted = await system.post("/v1/messages/count_tokens", {"model": "coder", "messages": ASK["messages"]})
            assert (counted.status, counted.json()["model"]) == (200, "coder") and counted.json()["input_tokens"] > 0
            assert (await system.post("/m/planner/v1/messages/count_tokens", ASK)).json()["model"] == "planner"
            refused = await system.post("/v1/messages/count_tokens", {"model": "nobody", "messages": []})
            assert refused.status == 404 and refused.json()["error"]["type"] == "not_found_error"
            assert (await system.post("/v1/messages/count_tokens", b"{")).json()["type"] == "error"

    run(scenario())


STREAM_ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"full"}}\n\n'
BEGUN = b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1"}}\n\n'
FAILED = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"message":"oops"}}}\n\n'


@pytest.mark.parametrize(
    ("path", "said", "status", "rest"),
    [
        ("/v1/messages", STREAM_ERROR, 503, None),
        ("/v1/messages", BEGUN + STREAM_ERROR, 200, error_event_for(Endpoint.MESSAGES, 503, "full", kind="")),
        ("/v1/responses", FAILED, 500, None),
    ],
)
def test_a_stream_that_fails_is_an_error(path, said, status, rest):
    async def scenario():
        async with running_system() as system:
            decode = system.decode["planner"][0]
            decode.behave, decode.said = "said", said
            answer = await system.post(path, ASK | {"stream": True, "input": "x"})
            assert answer.status == status, answer.body
            if rest is not None:
                told = json.loads(answer.body.rpartition(b"data: ")[2])
                assert answer.body.startswith(BEGUN) and answer.body[len(BEGUN) :].startswith(b"event: error\n")
                assert told["error"]["type"] == "overloaded_error" and "full" in told["error"]["message"]
            assert (await system.last_call())["outcome"] == "worker_failed"

    run(scenario())


def test_a_lost_prefill_is_noticed_behind_an_error_that_says_nothing():
    """SGLang's `/v1/messages` hides that the KV did not come."""

    async def scenario():
        async with running_system(prefill=2, decode={"planner": 1}, loss_wait_s=3.0, poll_timeout_s=0.3) as system:
            first, decode = system.prefill[0], system.decode["planner"][0]
            decode.said = SAYS_NOTHING
            first.script, decode.script = ["hang"], ["said:500"]
            client = asyncio.create_task(system.post("/v1/messages", ASK))
            await asyncio.gather(first.arrived.wait(), decode.arrived.wait())
            first.info_behave = "hang"
            answer = await client
            assert (answer.status, (await system.last_call())["attempts"]) == (200, 2)

    run(scenario())


SAYS_NOTHING = b'{"type":"error","error":{"type":"api_error","message":"Internal server error"}}'
SAYS_MORE = b'{"type":"error","error":{"type":"api_error","message":"cannot read /srv/models/planner/x.bin"}}'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("role", "behave", "said", "status", "kind", "says"),
    [
        ("decode", "said:500", SAYS_NOTHING, 500, "api_error", "answered 500 and does not say why; its log does."),
        ("prefill", "said:500", SAYS_NOTHING, 500, "api_error", "answered 500 and does not say why; its log does."),
        ("decode", "said:500", SAYS_MORE, 500, "api_error", "answered 500: cannot read x.bin"),
        ("decode", "die", b"", 502, "api_error", "The connection to the "),
    ],
)
def test_a_messages_call_that_fails_is_told_which_worker_failed(stream, role, behave, said, status, kind, says):
    """What SGLang says there is one text for every failure."""

    async def scenario():
        async with running_system(retries=0) as system:
            worker = system.decode["planner"][0] if role == "decode" else system.prefill[0]
            worker.said, worker.script = said, [behave]
            if role == "prefill":
                system.decode["planner"][0].behave = "hang"
            answer = await system.post("/v1/messages", ASK | {"stream": stream})
            assert answer.status == status, answer.body
            told = answer.json()
            assert told.keys() == {"type", "error"} and told["type"] == "error"
            assert told["error"].keys() == {"type", "message"} and told["error"]["type"] == kind
            assert worker.url in told["error"]["message"] and says in told["error"]["message"], told
            assert "/srv" not in answer.body.decode()

    run(scenario())


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_a_stream_that_prefill_fails_midway_ends_with_its_words_without_file_paths(path):
    async def scenario():
        async with running_system(retries=0) as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            prefill.said, prefill.script, decode.behave = SAYS_MORE, ["said_late:500"], "hang_after_first"
            answer = await system.post(path, ASK | {"stream": True})
            told = json.loads(answer.body.rstrip().rpartition(b"data: ")[2])["error"]["message"]
            assert told == f"The prefill worker {prefill.url} answered 500: cannot read x.bin"

    run(scenario())


def test_a_count_that_no_worker_gives_is_an_error_of_anthropics_form():
    async def scenario():
        async with running_system() as system:
            planner = system.decode["planner"][0]
            await planner.stop()
            answer = await system.post("/v1/messages/count_tokens", {"model": "planner", "messages": ASK["messages"]})
            assert answer.status in (502, 503) and planner.url in answer.error
            assert answer.json().keys() == {"type", "error"}

    run(scenario())


# ------------------------------------------------------------------------------------------------ responses


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_goes_on_from_one_that_the_router_kept(stream):
    async def scenario():
        async with running_system(prefill=2, decode={"planner": 2}) as system:
            for worker in system.decode["planner"]:
                worker.behave = "respond"
            first = {"model": "planner", "input": "hello", "stream": stream, "instructions": "Be brief."}
            begun = await system.post("/v1/responses", first)
            assert begun.status == 200
            told = begun.json() if not stream else json.loads(begun.body.rpartition(b"data: ")[2])["response"]
            (seen,) = (seen for worker in system.decode["planner"] for seen in worker.seen)
            assert told["id"].startswith("resp_") and told["id"] != seen.body["request_id"]
            assert seen.body["request_id"].startswith("resp_") and seen.headers.get(RID_HEADER) is None
            p = next(seen for worker in system.prefill for seen in worker.seen)
            assert (p.body["max_output_tokens"], p.body["model"], p.body["stream"]) == (3, "base", False)
            assert p.body["request_id"] == seen.body["request_id"]

            then = {"previous_response_id": told["id"], "input": [{"role": "user", "content": "more"}]}
            assert (await system.post("/v1/responses", then)).status == 200
            last = max((s for worker in system.decode["planner"] for s in worker.seen), key=lambda s: len(s.raw))
            assert "previous_response_id" not in last.body and last.body["model"] == "planner"
            assert last.body["input"] == [{"role": "user", "content": "hello"}, *told["output"], *then["input"]]
            calls = (await system.get("/calls")).json()["calls"]
            assert [call["decision"] for call in calls[1:]] == [call["decode_decision"] for call in calls[1:]]
            assert calls[1]["decision"] == "session"
            for name in ("prefill_worker", "decode_worker"):
                assert calls[0][name] == calls[1][name]

            assert (await system.get(f"/v1/responses/{told['id']}")).json() == told
            async with system.http.delete(f"{system.url}/v1/responses/{told['id']}") as response:
                assert (await response.json())["deleted"] is True
            assert (await system.get(f"/v1/responses/{told['id']}")).status == 404
            gone = await system.post("/v1/responses", then)
            assert (gone.status, gone.json()["error"]["type"]) == (404, "previous_response_not_found")

    run(scenario())


def test_what_is_not_to_be_kept_is_not_and_a_router_may_keep_nothing():
    async def scenario():
        async with running_system() as system:
            system.decode["planner"][0].behave = "respond"
            ask = {"model": "planner", "input": "x", "store": False}
            told = (await system.post("/v1/responses", ask)).json()
            assert (await system.get(f"/v1/responses/{told['id']}")).status == 404
        async with running_system(response_store_bytes=0) as system:
            answer = await system.post("/v1/responses", {"input": "x", "previous_response_id": "resp_1"})
            assert answer.status == 400 and "keeps no responses" in answer.error

    run(scenario())


def responded(name, text="x", session_key=None):
    body = {"input": text}
    request = ClientRequest(
        Endpoint.RESPONSES, "planner", b"", body, False, None, (b"x",), name, (name,), session_key, False
    )
    return request, json.dumps({"id": name, "output": []}).encode()


def test_kept_responses_are_bounded_and_each_callers_own():
    store = ResponseStore(max_bytes=500)
    for number in range(20):
        request, said = responded(f"resp_{number}", "y" * 40)
        listen = store.listener(request, caller="alice", workers=lambda: ("p", "d"))
        assert listen is not None
        listen(said)
        assert store.byte_count <= 500
    assert store.continued("resp_0", caller="alice") is None
    assert store.continued("resp_19", caller="bob") is None and not store.remove("resp_19", caller=None)
    kept = store.continued("resp_19", caller="alice")
    assert kept == Continued([{"role": "user", "content": "y" * 40}], "planner", "resp_19", ("p", "d"))
    request, said = responded("resp_big", "z" * 600)
    listen = store.listener(request, caller="alice", workers=lambda: ("p", "d"))
    assert listen is not None
    listen(said)
    assert (
        store.continued("resp_big", caller="alice") is None and store.continued("resp_19", caller="alice") is not None
    )


def test_only_a_stream_that_ended_well_is_a_response():
    end = b'event: response.completed\ndata: {"response":{"id":"r"}}\n\n'
    assert whole_response(b"event: a\ndata: {}\n\n" + end, is_stream=True) == {"id": "r"}
    assert whole_response(end.replace(b"completed", b"created"), is_stream=True) is None
    assert whole_response(b'data: {"delta":"event: response.completed"}\n\n', is_stream=True) is None
    assert whole_response(b"event: response.completed\ndata: {oops\n\n", is_stream=True) is None


def test_a_module_that_is_an_adapter_is_named_in_a_header():
    def prepare(prefill, decode):
        decode["planner"][0].info = info(Role.DECODE, "base", modules=["planner", "coder"])

    async def scenario():
        async with running_system(decode={"planner": 1}, prepare=prepare) as system:
            for path in ("/v1/responses", "/v1/messages"):
                assert (await system.post(path, ASK | {"input": "x"})).status == 200
            responses, messages = system.decode["planner"][0].seen
            assert responses.headers[ADAPTER_HEADER] == "planner"
            assert ADAPTER_HEADER not in messages.headers and messages.body["model"] == "planner"

    run(scenario())


# ------------------------------------------------------------------------------------------ several answers


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3}, 3),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 4),
        ("/generate", {"text": "a", "sampling_params": {"n": 2, "temperature": 1}}, 2),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 2}]}, 4),
    ],
)
def test_each_of_n_answers_has_a_room_and_a_name_of_its_own(path, body, count):
    async def scenario():
        async with running_system() as system:
            assert (await system.post(path, {"model": "planner"} | body)).status == 200
            p, d = system.prefill[0].seen[0].body, system.decode["planner"][0].seen[0].body
            for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid"):
                assert p[name] == d[name] and len(d[name]) == count
            assert len(set(d["bootstrap_room"])) == len(set(d["rid"])) == count
            if path == "/generate":
                assert p["sampling_params"] == {"max_new_tokens": 1, "temperature": 0.0, "n": 2}
                assert d["sampling_params"] == body["sampling_params"]
            else:
                assert p["n"] == d["n"] == body["n"]
            assert (await system.last_call())["worker_rids"] == d["rid"]

    run(scenario())


def test_the_client_sees_its_own_name_on_each_answer_and_all_are_aborted():
    async def scenario():
        async with running_system() as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            decode.behave = "echo"
            body = {"model": "planner", "text": ["a", "b"], "rid": "r", "sampling_params": {"n": 2}}
            answer = await system.post("/generate", body)
            assert [item["meta_info"]["id"] for item in answer.json()] == ["r_0", "r_0", "r_1", "r_1"]
            prefill.behave, decode.behave = "bad", "hang"
            assert (await system.post("/generate", body)).status == 400
            await until(lambda: decode.aborted == decode.seen[1].body["rid"])

    run(scenario())
