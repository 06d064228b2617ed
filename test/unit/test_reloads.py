"""`reloads.py`: what a topology that was read anew may change, and whom it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.config import topology_from
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.reloads import check_reload, free_name, match, summary
from test.unit.deploying import topology_data


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"router": {"host": "0.0.0.0"}}, "router.host is 0.0.0.0 and was 127.0.0.1"),
        ({"router": {"port": 8001}}, "router.port is 8001 and was 0"),
        ({"router": {"args": {"retries": 2}}}, "router.args.retries changed"),
        ({"base": {"model": "other"}}, "base.model is "),
        ({"args": {"api-key": "sesame"}}, "args.api-key changed"),
        ({"unified": True, "decode": [{"name": "a", "adapter": "model"}]}, "unified is true and was false"),
    ],
)
def test_what_needs_another_router_or_base_is_refused_by_its_key(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    (tmp_path / "other").mkdir()
    data = topology_data(tmp_path, "")
    before = topology_from(data, directory=tmp_path)
    check_reload(before, before)
    after = topology_from({**data, **change}, directory=tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_reload(before, after)
    assert str(caught.value).startswith(key) and "restart `up`" in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_modules_workers_args_and_env_may_change(tmp_path: Path) -> None:
    before = topology_from(topology_data(tmp_path, ""), directory=tmp_path)
    decode = [{"name": "tester", "model": "model"}, {"name": "a", "adapter": "model"}]
    changes = {"base": {"model": "model", "workers": 2}, "decode": decode, "args": {"dtype": "float32"}}
    check_reload(before, topology_from({**topology_data(tmp_path, ""), **changes}, directory=tmp_path))


@pytest.mark.parametrize("change", [{"decode": [{"name": "b", "adapter": "model"}]}, {"unified": False}])
def test_a_unified_server_does_not_change(tmp_path: Path, change: dict[str, Any]) -> None:
    data = {**topology_data(tmp_path, ""), "unified": True, "decode": [{"name": "a", "adapter": "model"}]}
    before, after = (topology_from(each, directory=tmp_path) for each in (data, {**data, **change}))
    with pytest.raises(ConfigError, match="unified"):
        check_reload(before, after)


def test_a_worker_is_kept_for_what_it_is_and_under_its_own_name_first() -> None:
    running = [("base", "b"), ("coder.0", "c"), ("coder.1", "c"), ("twin", "t")]
    assert match(running, running) == [0, 1, 2, 3]
    assert match(running, [("base", "b"), ("coder.1", "c")]) == [0, 2]
    assert match(running, [("base", "b"), ("coder.0", "c"), ("coder.1", "c"), ("coder.2", "c")]) == [0, 1, 2, None]
    assert match([("coder", "c")], [("coder.0", "c"), ("coder.1", "c")]) == [0, None], "one more of the same"
    assert match(running, [("twin", "changed"), ("coder.0", "t")]) == [None, 3]
    assert match([], []) == []


def test_a_name_is_never_given_twice() -> None:
    assert free_name("coder", {"base"}) == "coder"
    assert free_name("coder", {"coder"}) == "coder.0"
    assert free_name("coder.1", {"coder.0", "coder.1"}) == "coder.2"
    assert free_name("qwen.2.5", {"qwen.2.5", "qwen.2.0"}) == "qwen.2.1"


def test_a_change_is_told_by_name() -> None:
    told = summary(came=["tester", "coder"], left=["coder", "twin"], kept_count=2)
    assert told == "added tester, replaced coder, removed twin; 2 as they were"
    assert summary(came=["a", "b"], left=[], kept_count=1) == "added a and b; 1 as they were"
