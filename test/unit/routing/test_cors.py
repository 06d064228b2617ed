"""Web pages of other origins, and OPTIONS."""

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.config import RouterConfig
from test.unit.routing.routing_harness import STREAM, WHOLE, run, running_system

PAGE = "https://agents.example:8443"


def test_pages_of_the_named_origins_may_ask_and_others_may_not():
    async def scenario():
        async with running_system(cors_origins=(PAGE, "http://localhost:3000")) as system:
            ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-odd"}
            url = system.url + "/v1/chat/completions"
            async with system.http.options(url, headers={"Origin": PAGE, **ask}) as response:
                assert response.status == 200
                assert response.headers["Access-Control-Allow-Origin"] == PAGE
                assert "POST" in response.headers["Access-Control-Allow-Methods"]
                assert response.headers["Access-Control-Allow-Headers"] == "authorization, x-odd"
            async with system.http.options(url, headers={"Origin": "https://evil.example", **ask}) as response:
                assert response.status == 400 and "Access-Control-Allow-Origin" not in response.headers
            whole = await system.chat(headers={"Origin": PAGE})
            assert (whole.body, whole.headers["Access-Control-Allow-Origin"]) == (WHOLE, PAGE)
            assert "x-request-id" in whole.headers["Access-Control-Expose-Headers"].lower()
            stream = await system.chat(stream=True, headers={"Origin": PAGE})
            assert (stream.body, stream.headers["Access-Control-Allow-Origin"]) == (b"".join(STREAM), PAGE)
            assert "Access-Control-Allow-Origin" not in (await system.chat(headers={"Origin": "http://b"})).headers

    run(scenario())


def test_without_origins_no_page_may_ask_and_options_says_what_a_path_takes():
    async def scenario():
        async with running_system() as system:
            assert "Access-Control-Allow-Origin" not in (await system.chat(headers={"Origin": PAGE})).headers
            for path, allowed in (("/v1/chat/completions", {"POST"}), ("/v1/models", {"GET", "HEAD"})):
                async with system.http.options(system.url + path) as response:
                    assert response.status == 204
                    assert set(response.headers["Allow"].split(", ")) == allowed | {"OPTIONS"}
            assert (await system.post("/v1/models", {})).status == 405
            assert "GET" in (await system.post("/v1/models", {})).error

    run(scenario())


@pytest.mark.parametrize("origin", ["agents.example", "https://a.example/", "ftp://a", "https://A.example", "null", ""])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(ConfigError, match="cors_origin is"):
        RouterConfig(prefill=["http://a"], decode={"m": ["http://b"]}, cors_origins=(origin,))
