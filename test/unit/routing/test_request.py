"""How one request's body becomes two."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.protocol import MODULE_HEADER
from sglang_prefillshare.request_fields import OPENAI
from sglang_prefillshare.routing.request import (
    ClientRequest,
    Endpoint,
    Pairing,
    canonical_prompts,
    decode_leg_body,
    draw_rooms,
    forwarded_headers,
    parse_request,
    prefill_leg_body,
    prefill_leg_headers,
)

MODULES = ("planner", "coder")
PAIRING = Pairing("h", 8998, (5,), ("r",))


def parsed(endpoint: Endpoint, body: dict, **headers: str) -> ClientRequest:
    raw = json.dumps({"model": "planner"} | body, indent=1).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return parse_request(endpoint, raw, headers=named, modules=MODULES)


def test_the_prefill_leg_keeps_what_shapes_the_prompt_and_drops_the_sampling():
    shaping = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "chat_template_kwargs": {"enable_thinking": False},
        "continue_final_message": True,
        "reasoning_effort": "low",
        "cache_salt": "s",
        "priority": 3,
        "something_new": 1,
    }
    sampling = {
        "stream": True,
        "stream_options": {},
        "logprobs": True,
        "top_logprobs": 2,
        "lora_path": "l",
        "response_format": {"type": "json_object"},
        "stop": ["a"],
        "stop_token_ids": [1],
        "logit_bias": {},
        "max_completion_tokens": 99,
        "min_tokens": 5,
        "temperature": 0.7,
        "n": 1,
    }
    request = parsed(Endpoint.CHAT, shaping | sampling)
    body = json.loads(prefill_leg_body(request, base_model="base", pairing=PAIRING))
    added = {"model": "base", "stream": False, "max_tokens": 1, "temperature": 0.0, "rid": "r"}
    added |= {"bootstrap_host": "h", "bootstrap_port": 8998, "bootstrap_room": 5}
    assert body == shaping | added


def test_the_generate_prefill_leg_names_the_module_and_drops_the_logprobs():
    fields = {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 2, "token_ids_logprob": [1]}
    request = parsed(Endpoint.GENERATE, {"text": "x", "sampling_params": {"stop": "y"}} | fields)
    body = json.loads(prefill_leg_body(request, base_model="base", pairing=PAIRING))
    assert body.pop("sampling_params") == {"max_new_tokens": 1, "temperature": 0.0}
    assert body.pop("routing_key") == "planner"
    assert body.keys() == {"text", "stream", "rid", "bootstrap_host", "bootstrap_port", "bootstrap_room"}


def test_the_decode_leg_is_the_clients_bytes_and_the_pairing():
    raw = b'{"model":"planner", "text":"\\u00e9 {}}",  "x": 1.10 }\n'
    request = parse_request(Endpoint.GENERATE, raw, headers={}, modules=MODULES)
    body = decode_leg_body(request, pairing=PAIRING)
    assert body.startswith(raw.rstrip()[:-1])
    pairing = {"bootstrap_host": "h", "bootstrap_port": 8998, "bootstrap_room": 5, "rid": "r"}
    assert json.loads(body) == json.loads(raw) | pairing


def test_pairing_fields_from_the_client_are_replaced():
    request = parsed(Endpoint.GENERATE, {"text": "x", "bootstrap_room": 1, "rid": "mine", "lora_path": "planner"})
    body = decode_leg_body(request, pairing=PAIRING)
    assert body.count(b"bootstrap_room") == 1
    assert json.loads(body)["bootstrap_room"] == 5
    assert "lora_path" not in json.loads(body)


def test_a_lora_adapter_of_the_decode_module_is_kept_on_its_leg_only():
    request = parsed(Endpoint.GENERATE, {"text": "x", "lora_path": "adapter"})
    assert json.loads(decode_leg_body(request, pairing=PAIRING))["lora_path"] == "adapter"
    assert "lora_path" not in json.loads(prefill_leg_body(request, base_model="base", pairing=PAIRING))


@pytest.mark.parametrize("sent", [{}, {"lora_path": "planner"}, {"lora_path": "coder"}])
def test_a_module_that_is_an_adapter_of_its_worker_is_named_there(sent):
    request = parsed(Endpoint.GENERATE, {"text": "x", "model": "planner", **sent})
    body = json.loads(decode_leg_body(request, pairing=PAIRING, is_adapter=True))
    assert body["lora_path"] == "planner" and body["bootstrap_room"] == 5
    request = parsed(Endpoint.CHAT, {"model": "planner", "messages": [{"role": "user", "content": "x"}], **sent})
    body = json.loads(decode_leg_body(request, pairing=PAIRING, is_adapter=True))
    assert body["model"] == "planner" and body.get("lora_path", "planner") == "planner"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=5,
)
CHECKED = {"model", "messages", "stream", "n", "rid", "lora_path", *OPENAI}
names = st.text(min_size=1).filter(lambda name: name not in CHECKED)


@given(st.dictionaries(names, json_values, max_size=4), st.text(min_size=1), st.booleans())
def test_both_legs_carry_the_same_prompt_and_pairing_for_any_other_fields(extra, text, ascii_only):
    body = {**extra, "model": "planner", "messages": [{"role": "user", "content": text}]}
    body.pop("input_ids", None)
    raw = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "replace")
    request = parse_request(Endpoint.CHAT, raw, headers={}, modules=MODULES)
    pairing = Pairing("h", 1, draw_rooms(1), request.rids)
    prefill = json.loads(prefill_leg_body(request, base_model="base", pairing=pairing))
    decode = json.loads(decode_leg_body(request, pairing=pairing))
    for name in ("messages", "bootstrap_room", "bootstrap_host", "bootstrap_port", "rid"):
        assert prefill[name] == decode[name]
    assert decode == json.loads(raw) | pairing.fields(parsed(Endpoint.CHAT, {"messages": [{}]}))


# -------------------------------------------------------------------------------------------------- prompts

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=4,
)


@given(messages, messages)
def test_a_longer_conversation_extends_a_shorter_one(start, more):
    (short,), _ = canonical_prompts(Endpoint.CHAT, {"messages": start})
    (long,), _ = canonical_prompts(Endpoint.CHAT, {"messages": start + more})
    assert long.startswith(short) and len(long) > len(short)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1), st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_longer_token_ids_extend_shorter_ones(start, more):
    (short,), _ = canonical_prompts(Endpoint.GENERATE, {"input_ids": start})
    (long,), _ = canonical_prompts(Endpoint.GENERATE, {"input_ids": start + more})
    assert long.startswith(short) and len(short) == 4 * len(start)


def test_an_answer_sent_back_with_empty_fields_is_the_same_message():
    def prompt(message):
        return canonical_prompts(Endpoint.CHAT, {"messages": [message]})

    plain = {"role": "assistant", "content": "x"}
    assert prompt(plain | {"refusal": None, "tool_calls": None}) == prompt(plain)
    assert prompt(plain | {"tool_calls": [{"id": "1"}]}) != prompt(plain)


def test_tools_come_first_and_count():
    body = {"messages": [{"role": "user", "content": "x"}]}
    (bare,), _ = canonical_prompts(Endpoint.CHAT, body)
    (with_tools,), _ = canonical_prompts(Endpoint.CHAT, body | {"tools": [{"type": "function"}]})
    assert with_tools.endswith(bare) and with_tools != bare


# ---------------------------------------------------------------------------------------------- names, keys


def test_request_ids_come_from_the_body_then_the_header_then_nowhere():
    prompt = {"text": "x"}
    assert parsed(Endpoint.GENERATE, prompt | {"rid": "a"}, x_request_id="b").rids == ("a",)
    assert parsed(Endpoint.GENERATE, {"text": ["x", "y"], "rid": "a"}).rids == ("a_0", "a_1")
    one, two = (parsed(Endpoint.GENERATE, prompt, x_request_id="b") for _ in range(2))
    assert one.public_rid == two.public_rid == "b"
    assert one.rids != two.rids, "a session may reuse its header"
    fresh = parsed(Endpoint.GENERATE, prompt)
    assert fresh.rids == (fresh.public_rid,) and len(fresh.public_rid) == 32


def test_the_session_is_the_header_then_the_user():
    assert parsed(Endpoint.GENERATE, {"text": "x", "user": "u"}, x_smg_routing_key="k").session_key == "k"
    assert parsed(Endpoint.GENERATE, {"text": "x", "user": "u"}).session_key == "u"
    assert parsed(Endpoint.GENERATE, {"text": "x"}).session_key is None


def test_hop_by_hop_headers_stay_behind():
    sent = [
        ("host", "router"),
        ("connection", "keep-alive, X-Odd"),
        ("x-odd", "1"),
        ("content-length", "5"),
        ("accept-encoding", "gzip"),
        ("authorization", "Bearer k"),
        ("traceparent", "00-1"),
        ("x-smg-routing-key", "session"),
    ]
    request = parsed(Endpoint.CHAT, {"messages": [{"role": "user", "content": "x"}]})
    forwarded = forwarded_headers(sent, request_id="r")
    assert dict(forwarded) == {
        "authorization": "Bearer k",
        "traceparent": "00-1",
        "x-smg-routing-key": "session",
        "x-request-id": "r",
        "content-type": "application/json",
    }
    assert dict(prefill_leg_headers(forwarded, request=request, pairing=PAIRING))[MODULE_HEADER] == "planner"


def test_a_key_in_anthropics_header_reaches_workers_that_know_the_other_and_is_replaced_by_the_routers_own():
    sent = [("x-api-key", "k"), ("x-prefill-share-rid", "mine"), ("x-override-bootstrap-room", "5")]
    assert dict(forwarded_headers(sent, request_id="r"))["authorization"] == "Bearer k"
    both = [*sent, ("authorization", "Bearer other")]
    assert dict(forwarded_headers(both, request_id="r"))["authorization"] == "Bearer other"
    inner = forwarded_headers(both, request_id="r", credentials=[("authorization", "Bearer inner")])
    assert inner == [("x-request-id", "r"), ("content-type", "application/json"), ("authorization", "Bearer inner")]
    assert forwarded_headers(both, request_id="r", credentials=[]) == inner[:2]


def test_every_answer_has_a_limit_of_its_own_to_make_room_for():
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert parsed(Endpoint.CHAT, chat | {"n": 3, "max_tokens": 7}).output_limits == [7, 7, 7]
    params = [{"n": 2, "max_new_tokens": 5}, {"n": 2}]
    assert parsed(Endpoint.GENERATE, {"text": ["a", "b"], "sampling_params": params}).output_limits == [5, 5, 128, 128]
    assert parsed(Endpoint.RESPONSES, {"input": "x", "max_output_tokens": 9}).output_limits == [9]
    assert parsed(Endpoint.MESSAGES, chat | {"max_tokens": 4}).output_limits == [4]


def test_rooms_are_never_zero_and_fit_63_bits():
    assert all(1 <= room < 2**63 for room in draw_rooms(1000))
