"""One server with the base and three adapters answers as the oracle: base KV for x1..x(n-1), an adapter from xn on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import torch

from sglang_prefillshare.config import AdapterModule, Topology, WorkerSettings
from sglang_prefillshare.protocol import TREE_PATH
from test.e2e.conftest import Models
from test.support.device import WORKER_ARGS
from test.support.models import make_adapter, sample_prompt
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import Answer, deploy, greedy, launch_server, post, session

NEW_TOKENS = 12
LENGTHS = (1, 2, 3, 15, 16, 17, 33, 64, 65, 66, 100, 128, 129, 300)
LAYOUTS = {"page16": 16, "page1": 1}


class Unified(NamedTuple):
    url: str
    page_size: int
    oracles: dict[str, Oracle]


@pytest.fixture(scope="module", params=LAYOUTS)
def unified(
    request: pytest.FixtureRequest, models: Models, adapters: dict[str, Path], adapter_oracles: dict[str, Oracle]
) -> Iterator[Unified]:
    """Chunks of 64 tokens, a pool of not much more than one long context, and now and then a retraction.

    With pages of one token, SGLang's default, as `prefillshare up` starts it.
    """
    page_size = LAYOUTS[request.param]
    args = {"page-size": page_size, "chunked-prefill-size": 64, "max-total-tokens": 1024, "max-running-requests": 8}
    env = {"SGLANG_TEST_RETRACT": "1"}
    if page_size == 1:
        modules = tuple(AdapterModule(name, str(folder)) for name, folder in adapters.items())
        described = Topology(
            WorkerSettings(str(models.base), args=WORKER_ARGS | args, env=env), (), adapters=modules, is_unified=True
        )
        with deploy(described) as deployment:
            yield Unified(deployment.url, page_size, adapter_oracles)
        return
    words = [f"--{name}={value}" for name, value in args.items()]
    words += ["--prefill-share-role", "unified"]
    words += ["--lora-paths", *(f"{name}={folder}" for name, folder in adapters.items())]
    with launch_server(models.base, words, env) as url:
        yield Unified(url, page_size, adapter_oracles)


async def ask(client: aiohttp.ClientSession, url: str, module: str, body: dict[str, Any]) -> Answer:
    return await post(client, f"{url}/generate", {**body, "lora_path": module})


def ask_all(unified: Unified, jobs: Sequence[tuple[str, dict[str, Any]]]) -> list[Answer]:
    """Eight at a time."""

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(8)

        async def one(client: aiohttp.ClientSession, module: str, body: dict[str, Any]) -> Answer:
            async with gate:
                return await ask(client, unified.url, module, body)

        async with session() as client:
            return await asyncio.gather(*(one(client, module, body) for module, body in jobs))

    return asyncio.run(run())


def check_all(unified: Unified, jobs: Sequence[tuple[str, list[int]]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    answers = ask_all(unified, [(module, greedy(prompt, new_tokens)) for module, prompt in jobs])
    for (module, prompt), answer in zip(jobs, answers, strict=True):
        unified.oracles[module].check(prompt, answer.token_ids, new_tokens)
    return answers


def computed_by_base(answer: Answer, prompt: Sequence[int]) -> int:
    return len(prompt) - 1 - int(answer.body["meta_info"]["cached_tokens"])


def test_answers_equal_the_oracle_in_batches_of_three_modules(unified: Unified) -> None:
    jobs = [
        (name, clear_prompt(oracle, n, NEW_TOKENS, seed=n)) for n in LENGTHS for name, oracle in unified.oracles.items()
    ]
    check_all(unified, jobs)


def test_modules_answer_one_prompt_differently_and_compute_it_once(unified: Unified) -> None:
    prompt = sample_prompt(161, seed=11)
    answers = [check_all(unified, [(name, prompt)])[0] for name in unified.oracles]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert [computed_by_base(answer, prompt) for answer in answers] == [160, 0, 0]


def test_what_a_module_generated_is_not_taken_for_the_bases_kv(unified: Unified) -> None:
    """A prompt goes on just as an answer did: the base computes what the module had written."""
    prompt = clear_prompt(unified.oracles["planner"], 81, 40, seed=21)
    [answer] = check_all(unified, [("planner", prompt)], new_tokens=40)
    longer = [*prompt, *answer.token_ids, *sample_prompt(5, seed=22)]
    for module in ("coder", "planner"):
        [later] = check_all(unified, [(module, longer)])
        if module == "coder":
            assert computed_by_base(later, longer) == len(longer) - 1 - 80
        else:
            assert computed_by_base(later, longer) == (len(longer) - 1) % unified.page_size


def test_a_session_computes_its_context_once(unified: Unified) -> None:
    """Three modules in four turns each: what the base computes is the last context, and what pages leave over."""
    context, computed = sample_prompt(40, seed=31), 0
    for turn in range(4):
        for module in unified.oracles:
            [answer] = check_all(unified, [(module, context)])
            computed += computed_by_base(answer, context)
            last = len(context)
            context = [*context, *answer.token_ids, *sample_prompt(6, seed=32 + turn)]
    assert computed >= last - 1
    if unified.page_size == 1:
        assert computed <= 1.02 * last
    else:
        assert computed <= last + 12 * unified.page_size


def test_under_pressure_prompts_are_evicted_and_requests_retracted_and_answers_stay_right(unified: Unified) -> None:
    jobs = [
        (name, clear_prompt(oracle, 60 + n, 40, seed=n)) for n in range(4) for name, oracle in unified.oracles.items()
    ]
    answers = check_all(unified, jobs, new_tokens=40)
    assert any(answer.body["meta_info"].get("num_retractions") for answer in answers), "nothing was retracted"


def test_what_is_retracted_goes_on_with_its_penalties(unified: Unified) -> None:
    """SGLang makes new penalties for a request that resumes, which know nothing of what it had generated."""
    strength = 0.7

    def penalised(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        return logits - strength * torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=len(logits))

    def clear(oracle: Oracle, seed: int) -> list[int]:
        for attempt in range(50):
            prompt = sample_prompt(80, seed=100 * seed + attempt)
            if oracle.generate(prompt, 40, adjust=penalised).smallest_gap >= 3e-3:
                return prompt
        raise AssertionError("50 prompts, and each has an answer with a near tie")

    jobs = [(name, clear(oracle, seed)) for seed in range(2) for name, oracle in unified.oracles.items()]
    bodies = []
    for name, prompt in jobs:
        body = greedy(prompt, 40)
        bodies.append((name, {**body, "sampling_params": {**body["sampling_params"], "frequency_penalty": strength}}))
    answers = ask_all(unified, bodies)
    for (name, prompt), answer in zip(jobs, answers, strict=True):
        unified.oracles[name].check(prompt, answer.token_ids, 40, adjust=penalised)
    assert any(answer.body["meta_info"].get("num_retractions") for answer in answers), "nothing was retracted"


def test_sampling_is_sglangs_from_the_first_token_on(unified: Unified) -> None:
    """A stop token, an end that is forbidden at first, a grammar, and log-probabilities."""
    oracle = unified.oracles["coder"]
    prompt = clear_prompt(oracle, 50, NEW_TOKENS, seed=41)
    wanted = oracle.generate(prompt, NEW_TOKENS).token_ids
    stops = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "stop_token_ids": [wanted[3]]}
    bodies = [
        {"input_ids": prompt, "sampling_params": stops},
        {"input_ids": prompt, "sampling_params": {**stops, "stop_token_ids": [wanted[0]], "min_new_tokens": 2}},
        {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 8, "regex": "[0-9]{4}"}},
        {**greedy(prompt, NEW_TOKENS), "return_logprob": True},
    ]
    stopped, late, digits, logged = ask_all(unified, [("coder", body) for body in bodies])
    assert stopped.token_ids == wanted[: wanted.index(wanted[3]) + 1]
    assert len(late.token_ids) >= 2 and late.token_ids[0] != wanted[0]
    assert digits.body["text"].isdigit() and len(digits.body["text"]) == 4
    assert [token for _, token, _ in logged.body["meta_info"]["output_token_logprobs"]] == wanted


def test_modules_are_named_and_the_base_answers_nobody(unified: Unified) -> None:
    async def run() -> dict[str, Answer]:
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
        async with session() as client:

            async def posted(path: str, **body: Any) -> Answer:
                return await post(client, unified.url + path, body)

            async with client.get(f"{unified.url}/v1/models") as response:
                models = Answer(response.status, response.headers, await response.json())
            return {
                "models": models,
                "chat": await posted("/v1/chat/completions", model="planner", **chat),
                "other chat": await posted("/v1/chat/completions", model="coder", **chat),
                "by path": await posted("/m/planner/v1/chat/completions", model="planner", **chat),
                "unknown": await posted("/v1/chat/completions", model="nobody", **chat),
                "streamed unknown": await posted("/v1/chat/completions", model="nobody", stream=True, **chat),
                "unknown path": await posted("/m/nobody/generate", text="a"),
                "base": await posted("/generate", text="a"),
                "unknown adapter": await posted("/generate", text="a", lora_path="nobody"),
            }

    found = asyncio.run(run())
    assert [card["id"] for card in found["models"].body["data"]] == ["coder", "planner", "reviewer"]
    assert found["chat"].status == found["by path"].status == 200, (found["chat"], found["by path"])
    answers = [found[name].body["choices"][0]["message"]["content"] for name in ("chat", "other chat", "by path")]
    assert answers[0] == answers[2] != answers[1]
    for name in ("unknown", "streamed unknown", "unknown path"):
        assert found[name].status == 404 and "coder, planner, reviewer" in json.dumps(found[name].body), name
    for name in ("base", "unknown adapter"):
        assert found[name].status == 400 and "coder, planner, reviewer" in json.dumps(found[name].body), name


def test_modules_come_and_go_while_others_are_served(unified: Unified, models: Models, tmp_path: Path) -> None:
    """One of this base, one of another base, one whose weights fit nothing. What runs ends as it began."""
    tester = make_adapter(tmp_path / "tester", models.base, seed=61, rank=8)
    strange = make_adapter(tmp_path / "strange", models.planner, seed=62)
    broken = make_adapter(tmp_path / "broken", models.base, seed=63, rank=4)
    shutil.copy(tester / "adapter_model.safetensors", broken)
    prompt = clear_prompt(Oracle(models.base, models.base, adapter=tester), 120, NEW_TOKENS, seed=64)

    async def run() -> dict[str, Answer]:
        async with session() as client:

            async def load(name: str, folder: Path) -> Answer:
                return await post(
                    client, f"{unified.url}/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
                )

            async def unload(name: str) -> Answer:
                return await post(client, f"{unified.url}/unload_lora_adapter", {"lora_name": name})

            found = {"before": await ask(client, unified.url, "coder", greedy(prompt, NEW_TOKENS))}
            found |= {"strange": await load("strange", strange), "broken": await load("broken", broken)}
            found |= {"loaded": await load("tester", tester), "twice": await load("coder", tester)}
            under_way = asyncio.create_task(ask(client, unified.url, "tester", greedy(prompt, 40)))
            found["answer"] = await ask(client, unified.url, "tester", greedy(prompt, NEW_TOKENS))
            found |= {"unloaded": await unload("tester"), "under way": await under_way}
            found["gone"] = await ask(client, unified.url, "tester", greedy(prompt, NEW_TOKENS))
            found["unknown"] = await unload("nobody")
            found["after"] = await ask(client, unified.url, "coder", greedy(prompt, NEW_TOKENS))
            return found

    found = asyncio.run(run())
    assert found["strange"].status == 400 and "the base's weights changed" in found["strange"].body["error_message"]
    assert found["broken"].status == 400 and "cannot be served" in found["broken"].body["error_message"]
    assert found["twice"].status == 400 and "already loaded" in found["twice"].body["error_message"]
    assert found["loaded"].status == found["unloaded"].status == 200
    Oracle(models.base, models.base, adapter=tester).check(prompt, found["answer"].token_ids, NEW_TOKENS)
    assert found["under way"].token_ids[:NEW_TOKENS] == found["answer"].token_ids
    assert len(found["under way"].token_ids) == 40
    assert found["gone"].status == 400 and "no module 'tester'" in json.dumps(found["gone"].body)
    assert found["unknown"].status == 400 and "no module 'nobody'" in found["unknown"].body["error_message"]
    assert found["after"].token_ids == found["before"].token_ids
    assert computed_by_base(found["answer"], prompt) == (len(prompt) - 1) % unified.page_size


HOSTILE: dict[str, tuple[dict[str, Any], int]] = {
    "a number for a module": ({"text": "a", "lora_path": 5}, 400),
    "a list for one prompt": ({"text": "a", "lora_path": ["planner"]}, 400),
    "fewer modules than prompts": ({"text": ["a", "b"], "lora_path": ["planner"]}, 400),
    "a prompt without a module": ({"text": ["a", "b"], "lora_path": ["planner", None]}, 400),
    "a prompt of an unknown module": ({"text": ["a", "b"], "lora_path": ["planner", "nobody"]}, 400),
    "no token": ({"input_ids": [], "lora_path": "planner"}, 400),
    "an id beyond the vocabulary": ({"input_ids": [5, 999999, 7], "lora_path": "planner"}, 400),
    "a stop beyond the vocabulary": (
        {"text": "a", "lora_path": "planner", "sampling_params": {"stop_token_ids": [99999999], "min_new_tokens": 3}},
        400,
    ),
    "log-probabilities of the prompt": (
        {"text": "abc", "lora_path": "planner", "return_logprob": True, "logprob_start_len": 0},
        400,
    ),
    "a session": ({"text": "a", "lora_path": "planner", "session_params": {"id": "s"}}, 400),
    "an id of SGLang's own": ({"text": "a", "lora_path": "planner", "rid": "HEALTH_CHECK_1", "lora_id": "x"}, 200),
    "no module, as a health check": ({"text": "a", "rid": "HEALTH_CHECK_1"}, 400),
    "a grammar that allows no token": (
        {
            "input_ids": [5, 6],
            "lora_path": "planner",
            "sampling_params": {"regex": "a", "min_new_tokens": 3, "max_new_tokens": 4},
        },
        400,
    ),
    "nothing to generate": (
        {"input_ids": [5, 6], "lora_path": "planner", "sampling_params": {"max_new_tokens": 0}},
        200,
    ),
    "another place": ({"text": "a", "lora_path": "planner", "bootstrap_host": "2.2.2.2", "bootstrap_room": 1}, 200),
    "modules of a batch": ({"text": ["a", "b"], "lora_path": ["planner", "coder"]}, 200),
}


def test_nothing_that_is_sent_ends_the_server(unified: Unified) -> None:
    async def run() -> dict[str, Answer]:
        async with session() as client:
            sent = {name: await post(client, f"{unified.url}/generate", body) for name, (body, _) in HOSTILE.items()}
            for path in ("/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/completions", "/v1/responses"):
                await post(client, unified.url + path, {"model": "nobody", "input": "a", "prompt": "a", "query": "a"})
            return sent

    found = {name: answer.status for name, answer in asyncio.run(run()).items()}
    assert found == {name: status for name, (_, status) in HOSTILE.items()}
    check_all(unified, [("coder", clear_prompt(unified.oracles["coder"], 50, NEW_TOKENS, seed=71))])


def test_the_tree_shows_who_computed_and_who_read_since(unified: Unified) -> None:
    """After all that the other tests did to it: prompts evicted, requests retracted."""
    prompt = sample_prompt(161, seed=81)
    for module in ("planner", "coder"):
        check_all(unified, [(module, prompt)])

    async def run() -> dict[str, Any]:
        async with session() as client, client.get(f"{unified.url}{TREE_PATH}?limit=5000") as response:
            return dict(await response.json())

    tree = asyncio.run(run())
    nodes = {node["id"]: node for node in tree["nodes"]}

    def ways(node: dict[str, Any] | None) -> list[tuple[int, str | None, set[str]]]:
        """From the root down to a node, which chunks may have cut up: tokens, owner, readers."""
        if node is None:
            return []
        owner = None if node["computed_for"] is None else tree["modules"][node["computed_for"]]
        own = (node["tokens"], owner, {tree["modules"][index] for index in node["read_by"]})
        return [*ways(nodes.get(node["parent"])), own]

    found = [ways(node) for node in tree["nodes"]]
    assert any(
        sum(n for n, *_ in way) == 160 and all(who == ["planner", {"coder"}] for _, *who in way) for way in found
    )
    held = sum(node["tokens"] for node in tree["nodes"])
    assert held + tree["unseen_tokens"] == tree["tree_tokens"] and tree["failure"] is None
    assert tree["unseen_tokens"] <= 0.1 * tree["pool_tokens"]


def test_clients_that_leave_take_nothing_along(unified: Unified) -> None:
    async def run() -> dict[str, Any]:
        async with session() as client:
            for module, length in (("planner", 400), ("coder", 30)):  # in the prompt, and in the answer
                body = {**greedy(sample_prompt(length, seed=51), 300), "lora_path": module}
                with pytest.raises(asyncio.TimeoutError):
                    async with asyncio.timeout(0.1):
                        await post(client, f"{unified.url}/generate", body)
            for _ in range(100):
                async with client.get(f"{unified.url}/v1/loads") as response:
                    load = (await response.json())["loads"][0]
                if (load["num_used_tokens"], load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0, 0):
                    break
                await asyncio.sleep(0.1)
            return dict(load)

    load = asyncio.run(run())
    assert (load["num_used_tokens"], load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 0, 0)


def test_n_answers_are_each_the_oracles(unified: Unified) -> None:
    prompts = {name: clear_prompt(oracle, 70, NEW_TOKENS, seed=31) for name, oracle in unified.oracles.items()}
    jobs = []
    for name, prompt in prompts.items():
        body = greedy(prompt, NEW_TOKENS)
        jobs.append((name, {**body, "sampling_params": {**body["sampling_params"], "n": 3}}))
    for (name, _), answer in zip(jobs, ask_all(unified, jobs), strict=True):
        assert answer.status == 200 and len(answer.body) == 3, answer
        for item in answer.body:
            unified.oracles[name].check(prompts[name], item["output_ids"], NEW_TOKENS)
