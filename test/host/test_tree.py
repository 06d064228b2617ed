"""The picture of the tree against SGLang's own tree, through our hooks: no node is missed, none is left over."""

from __future__ import annotations

import asyncio
import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

import torch  # noqa: E402
from sglang.srt.disaggregation.kv_events import BlockStored  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InsertParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.events import KvEventLoraNames  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_cache.tree_core_registry import create_tree_core  # noqa: E402

from sglang_prefillshare.host.http import tree as http  # noqa: E402
from sglang_prefillshare.host.roles import tree as hooks  # noqa: E402
from sglang_prefillshare.protocol import EventStream, Role  # noqa: E402
from sglang_prefillshare.tree import readable  # noqa: E402


class Cache:
    """SGLang's tree, as far as a checkpoint and an eviction go; the hooks are told as they are in a scheduler."""

    def __init__(self, *, page_size: int = 1, has_events: bool = False) -> None:
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=None,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            enable_kv_cache_events=has_events,
            dynamo_kv_event_format=True,
            kv_event_lora_names=KvEventLoraNames(),
        )
        self.tree_core = create_tree_core("rust", params, {})
        self.slots = 1

    def checkpoint(self, tokens: list[int], module: str, namespace: str = "ours") -> None:
        """A request's, from its match to its end."""
        key = RadixKey(array("q", tokens), extra_key=namespace).page_aligned(self.tree_core.page_size)
        found, _, _ = self.tree_core.match_full_device_prefix(key)
        values = torch.arange(self.slots, self.slots + len(key))
        self.slots += len(key)
        step = self.tree_core.begin_insert(InsertParams(key=key, value=values, prev_prefix_len=found))
        while step.result is None:
            step = self.tree_core.resume_insert()
        self.tree_core.end_insert()
        self.last = req = SimpleNamespace(
            extra_key=namespace,
            last_node=step.result.last_device_node,
            full_untruncated_fill_ids=array("q", tokens),
            origin_input_ids=array("q", tokens),
            cached_tokens=found,
            routing_key=module,
        )
        hooks.checkpoint(None, self, req, up_to=len(tokens))

    @property
    def tokens(self) -> int:
        return int(self.tree_core.full_evictable_size() + self.tree_core.full_protected_size())


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    made = Cache()
    role = SimpleNamespace(namespace="ours", settings=SimpleNamespace(role=Role.PREFILL, adapters=False, events=None))
    monkeypatch.setattr(hooks, "role_of", lambda _scheduler: role)
    setattr(made, hooks._ATTRIBUTE, hooks._Tree(SimpleNamespace(tree_cache=made, page_size=1)))
    return made


def picture(cache: Cache) -> Any:
    kept = getattr(cache, hooks._ATTRIBUTE)
    assert kept.failure is None, kept.failure
    return kept.mirror


def test_the_picture_has_every_token_of_sglangs_tree(cache: Cache) -> None:
    chance = random.Random(7)
    prompts: list[list[int]] = [[0]]
    for _ in range(400):
        begun = chance.choice(prompts)
        prompt = [*begun[: chance.randint(0, len(begun))], *(chance.randrange(4) for _ in range(chance.randint(1, 9)))]
        prompts.append(prompt)
        cache.checkpoint(prompt, chance.choice(["planner", "coder", "twin"]))
        assert picture(cache).tokens == cache.tokens
    described = readable(picture(cache).describe(limit=5000, leased=(), locked=(), now_s=0.0))
    for node in described["nodes"]:
        (path,) = cache.tree_core.collect_path_info([node["id"]])
        assert path[-1].path_end - path[-1].path_start == node["tokens"] == path[-1].full_value_len
        assert node["parent"] == (path[-2].node_id if len(path) > 1 else None)
        assert node["computed_for"] is not None
    assert {index for node in described["nodes"] for index in node["read_by"]} == {0, 1, 2}


def test_what_is_evicted_is_gone_and_what_is_not_the_bases_was_never_there(cache: Cache) -> None:
    cache.checkpoint([1, 2, 3, 4], "planner")
    cache.checkpoint([1, 2, 9], "coder")
    cache.checkpoint([5, 6], "health", namespace="nobody's")
    assert (picture(cache).tokens, cache.tokens) == (5, 7)
    leaf = max(node for node in range(20) if node in picture(cache)._nodes)
    hooks.evict_device_leaf(cache, leaf, {})
    assert picture(cache).tokens < 5
    hooks.reset(None, cache)
    assert picture(cache).tokens == 0


def test_a_bug_in_the_picture_ends_the_picture_and_not_the_worker(cache: Cache) -> None:
    cache.checkpoint([1, 2, 3], "planner")
    hooks.checkpoint(None, cache, SimpleNamespace(extra_key="ours", last_node=1), up_to=3)
    kept = getattr(cache, hooks._ATTRIBUTE)
    assert "not kept any more" in kept.failure
    cache.checkpoint([1, 2, 3], "planner")
    assert kept.mirror.tokens == 0


class Manager:
    """SGLang's tokenizer manager, as far as a scheduler can be asked through it."""

    def __init__(self, *, response: list[Any] | None = None, delay_s: float = 0.01) -> None:
        described = {"pool": {"pool_tokens": 9}, "tree": hooks.TreeMirror(lambda _node: (), page_size=1)}
        described["tree"] = described["tree"].describe(limit=5, leased=(), locked=(), now_s=0.0)
        self.response = [described] if response is None else response
        self.delay_s = delay_s
        self.limits: list[int] = []

    async def dumper_control(self, request: Any) -> list[Any]:
        self.limits.append(request.body["limit"])
        await asyncio.sleep(self.delay_s)
        return [SimpleNamespace(response=self.response, error="no tree")]


def test_however_many_ask_a_scheduler_is_asked_once_at_a_time() -> None:
    async def run() -> None:
        manager = Manager()
        asked = http.TreeDescriptions(manager, {"role": "prefill"})
        answers = await asyncio.gather(*(asked.latest(500) for _ in range(10)))
        assert manager.limits == [500] and all(answer is answers[0] for answer in answers)
        assert answers[0]["role"] == "prefill" and answers[0]["nodes"] == [] and answers[0]["pool_tokens"] == 9
        await asked.latest(100)
        assert manager.limits == [500], "what is fresh and larger serves"
        await asked.latest(5000)
        assert manager.limits == [500, 5000]
        asked._last_at -= http.FRESH_S
        await asked.latest(100)
        assert manager.limits == [500, 5000, 100]

    asyncio.run(run())


def test_a_scheduler_that_says_nothing_or_has_no_tree_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_TIMEOUT_S", 0.05)

    async def run() -> None:
        slow = Manager(delay_s=60)
        asked = http.TreeDescriptions(slow, {})
        for _ in range(3):
            with pytest.raises(http.SilentSchedulerError, match="did not answer"):
                await asked.latest(500)
        assert slow.limits == [500], "one question waits, however many gave up"
        with pytest.raises(http.SilentSchedulerError, match="no picture of the radix tree: no tree"):
            await http.TreeDescriptions(Manager(response=[]), {}).latest(500)

    asyncio.run(run())


@pytest.mark.parametrize("text", ["", "0", "5001", "-1", "1e3", "٣", "9" * 5000, "all"])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a number of nodes from 1 to 5000"):
        http.parse_limit(text)


def test_a_limit_is_a_number_of_nodes() -> None:
    assert [http.parse_limit(text) for text in (None, "1", "5000")] == [500, 1, 5000]


@pytest.mark.parametrize("page_size", [1, 4])
def test_blocks_are_called_what_sglangs_events_call_them(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every request, over splits and after a flush: the block whose tokens, with all before it, are the prompt's."""
    made = Cache(page_size=page_size, has_events=True)
    settings = SimpleNamespace(role=Role.PREFILL, adapters=False, events=EventStream(port=1, replay_port=2))
    monkeypatch.setattr(hooks, "role_of", lambda _scheduler: SimpleNamespace(namespace="ours", settings=settings))
    tree = hooks._Tree(SimpleNamespace(tree_cache=made, page_size=page_size))
    setattr(made, hooks._ATTRIBUTE, tree)
    draw, names = random.Random(3), {}
    for turn in range(300):
        if turn % 50 == 49:
            made.tree_core.reset()
            hooks.reset(None, made)
        tokens = [draw.randrange(3) for _ in range(draw.randint(1, 30))]
        made.checkpoint(tokens, "planner")
        for event in made.tree_core.take_events():
            if isinstance(event, BlockStored):
                ids = names.get(event.parent_block_hash, ())
                for place, block in enumerate(event.block_hashes):
                    start = page_size * place
                    ids = (*ids, *event.token_ids[start : start + page_size])
                    names[block] = ids
        whole = tuple(tokens[: len(tokens) // page_size * page_size])
        block = hooks.last_block(made, made.last)
        assert (block is None) == (not whole)
        if block is not None:
            assert names[block] == whole
        other = SimpleNamespace(last_node=made.last.last_node, origin_input_ids=array("q", [*tokens, *[1] * page_size]))
        assert hooks.last_block(made, other) is None, "its own last block is not there"
    assert tree.blocks is not None and 0 < len(tree.blocks) < 3000
    for node in list(tree.blocks._ends):
        hooks.evict_device_leaf(made, node, None)
    assert len(tree.blocks) == 0
