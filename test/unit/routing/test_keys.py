"""Keys of the router's clients: the file, and what passes the gate."""

import base64
import os
import stat

import pytest

from sglang_prefillshare import cli
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.keys import KeyFile, add_key, digest_of, parse_keys
from test.unit.routing.routing_harness import run, running_system

GOOD = f"# people\n\nalice:{digest_of('a')}\nbob-2 : {digest_of('b')}\n"


def test_a_file_names_its_keys():
    assert parse_keys(GOOD, source="keys") == {"alice": digest_of("a"), "bob-2": digest_of("b")}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pshare-secret", "keys:1: not a key's line"),
        ("alice:pshare-secret", "keys:1: not a key's line"),
        (f"no name:{'0' * 64}", "not a key's line"),
        (f"alice:{'0' * 63}", "not a key's line"),
        (f"alice:{'0' * 64}\nalice:{'1' * 64}", "keys:2: the key 'alice' is there twice"),
    ],
)
def test_a_line_that_is_none_is_named_and_not_shown(line, says):
    with pytest.raises(ConfigError) as refused:
        parse_keys(line, source="keys")
    assert says in str(refused.value) and "secret" not in str(refused.value)


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path, capsys):
    path = tmp_path / "keys"
    assert cli.run(["keys", "add", "alice", "--file", str(path)]) == 0
    alice = capsys.readouterr().out.strip()
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    bob = add_key(path, "bob")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    text = path.read_text()
    assert len(alice) > 40 and alice != bob and alice not in text and bob not in text
    keys = KeyFile(path)
    assert (keys.name_of(alice), keys.name_of(bob), keys.name_of(alice[:-1])) == ("alice", "bob", None)
    assert cli.run(["keys", "add", "alice", "--file", str(path)]) == 2
    assert "already" in capsys.readouterr().err
    assert cli.run(["keys", "add", "a:b", "--file", str(path)]) == 2


def test_a_file_that_changes_is_read_again_and_a_broken_one_changes_nothing(tmp_path):
    path, now = tmp_path / "keys", [0.0]
    path.write_text(GOOD)
    keys = KeyFile(path, now=lambda: now[0])

    def later(text):
        replaced = tmp_path / "new"
        replaced.write_text(text)
        replaced.rename(path)
        now[0] += 2.0

    later(f"carol:{digest_of('c')}\n")
    assert (keys.name_of("a"), keys.name_of("c")) == (None, "carol")
    later("oops\n")
    assert keys.name_of("c") == "carol"
    path.unlink()
    now[0] += 2.0
    assert keys.name_of("c") == "carol"
    later(GOOD)
    assert (keys.name_of("a"), keys.name_of("c")) == ("alice", None)
    later("# nobody any more\n")
    assert keys.name_of("a") is None


def test_a_router_does_not_start_with_keys_that_let_nobody_in(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(path)
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="prefillshare keys add"):
        KeyFile(path)


def test_only_known_keys_pass_and_no_worker_sees_one(tmp_path):
    path = tmp_path / "keys"
    key = add_key(path, "alice")

    async def scenario():
        async with running_system(api_keys_file=path, worker_api_key="inner", cors_origins=("*",)) as system:
            closed = ("/v1/models", "/v1/models/planner", "/workers", "/calls", "/metrics", "/server_info", "/nowhere")
            for path_ in closed:
                answer = await system.get(path_)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path_
                assert answer.json()["error"].keys() == {"object", "message", "type", "param", "code"}
            assert (await system.get("/health")).status == (await system.get("/m/coder/health")).status == 200
            assert (await system.get("/m/coder/health/../v1/models")).status == 401
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {key}"},
                {"x-api-key": "é"},
            ):
                assert (await system.chat(headers=headers)).status == 401
                told = await system.post("/v1/messages", {}, headers=headers)
                assert told.status == 401
                assert (told.json()["type"], told.json()["error"]["type"]) == ("error", "authentication_error")
            assert not system.prefill[0].seen
            for headers in ({"Authorization": f"bearer {key}"}, {"X-Api-Key": key}):
                assert (await system.chat(headers=headers)).status == 200
            for worker in (system.prefill[0], system.decode["planner"][0]):
                assert len(worker.seen) == 2
                for seen in worker.seen:
                    assert seen.headers["authorization"] == "Bearer inner"
                    assert key not in str(seen.headers) and "x-api-key" not in seen.headers
            page = await system.get("/ui")
            assert page.status == 401 and page.headers["WWW-Authenticate"].startswith("Basic ")
            for told, status in ((f"me:{key}", 200), ("me:wrong", 401), (key, 401)):
                basic = {"Authorization": f"Basic {base64.b64encode(told.encode()).decode()}"}
                async with system.http.get(system.url + "/ui/state", headers=basic) as response:
                    assert response.status == status
            bearer = {"Authorization": f"Bearer {key}"}
            async with system.http.post(system.url + "/m/coder/flush_cache", headers=bearer) as response:
                assert response.status == 403 and "--admin-api-key" in await response.text()
            async with system.http.get(system.url + "/calls", headers=bearer) as response:
                assert {call["caller"] for call in (await response.json())["calls"]} == {"alice"}
            # A browser asks first, without a key, and may read the refusal.
            ask = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
            async with system.http.options(system.url + "/v1/chat/completions", headers=ask) as response:
                assert response.status == 200
            async with system.http.get(system.url + "/workers", headers={"Origin": "http://a.example"}) as response:
                assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, "*")

    run(scenario())
