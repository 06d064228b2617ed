"""The page at /ui in a real browser, over the real router and workers that are scripted."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from test.unit.routing.routing_harness import System, described_tree, running_system

HOSTILE = "<img src=x onerror=alert(1)>"
TREE = described_tree(
    [
        {"id": 1, "tokens": 800, "read_by": [0, 1, 2]},
        {"id": 2, "parent": 1, "tokens": 300, "computed_for": 1, "read_by": [0], "leased": True},
        {"id": 3, "parent": 2, "tokens": 200, "computed_for": 0, "locked": True},
        {"id": 4, "parent": 1, "tokens": 100, "computed_for": 2},
        {"id": 5, "tokens": 1, "computed_for": None},
    ],
    modules=["planner", "coder", HOSTILE],
    other={"nodes": 12, "tokens": 90, "computed_for": [[0, 90]]},
    unseen_tokens=4,
)
CONTRAST = """
const light = (rgb) => {
  const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = rgb(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
  }
  return [255, 255, 255];
};
const poor = [];
const compare = (node, front, back) => {
  const [less, more] = [light(front), light(back)].sort((a, b) => a - b);
  if ((more + 0.05) / (less + 0.05) < 4.5) poor.push([node.textContent, front, back]);
};
for (const node of document.querySelectorAll("body *")) {
  if (!node.checkVisibility() || node.closest("svg, noscript, .u-wrap")) continue;
  const isText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (isText) compare(node, rgb(getComputedStyle(node).color), behind(node));
}
for (const node of document.querySelectorAll(".node")) {
  const [text, bar] = [node.querySelector("text"), node.querySelector(".span")];
  if (text.textContent) compare(node, rgb(getComputedStyle(text).fill), rgb(getComputedStyle(bar).fill));
}
return poor;
"""


class Site:
    """A router with its fake workers on a thread of their own, while a test uses the browser on this one."""

    def __init__(self) -> None:
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Site:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with running_system(decode={"planner": 1, "coder": 1}, longest_s=300) as system:
            self.system: System = system
            self.reset()
            self._is_up.set()
            await self._end.wait()

    def reset(self) -> None:
        for worker in self.system.workers:
            worker.tree, worker.tree_behave = described_tree(), "ok"
        self.system.prefill[0].tree = TREE

    def ask(self, model: str) -> None:
        asyncio.run_coroutine_threadsafe(self.system.chat(model, stream=True), self.loop).result(10)


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, driver: Any, site: Site) -> None:
        self.driver, self.site = driver, site

    def open(self, *, width: int = 1280, scheme: str = "light", motion: str = "no-preference") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer(scheme, motion)
        self.driver.get(f"{self.site.system.url}/ui")
        self.until(lambda: self.text("#status") == "Live")

    def prefer(self, scheme: str, motion: str = "no-preference") -> None:
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", motion)]
        media = {"features": [{"name": name, "value": value} for name, value in features]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def until(self, condition: Callable[[], bool]) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 15, poll_frequency=0.05).until(lambda _driver: condition())

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def text(self, selector: str) -> str:
        """What is to be read there; nothing of what is not shown."""
        script = (
            "const at = document.querySelector(arguments[0]); return at?.checkVisibility() ? at.innerText.trim() : ''"
        )
        return str(self.js(script, selector))

    def press(self, *keys: str) -> int | None:
        """Press keys; the number of the node that has the focus then."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()
        found = self.js("return document.activeElement.dataset.id")
        return None if found is None else int(found)

    @property
    def label(self) -> str:
        return str(self.js("return document.activeElement.getAttribute('aria-label')"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("selenium")
    if missing:
        message = f"waits for {', '.join(missing)}: run `scripts/setup.sh` and, as root on Debian, `scripts/browser.sh`"
        if os.environ.get("PREFILLSHARE_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield made
    made.quit()


@pytest.fixture
def page(driver: Any, site: Site) -> Iterator[Page]:
    site.reset()
    made = Page(driver, site)
    made.complaints()
    yield made
    driver.get("about:blank")


def test_the_page_shows_the_tree_the_workers_and_the_last_minutes(page: Page) -> None:
    page.site.ask("planner")
    page.site.ask("coder")
    page.open()
    page.until(lambda: page.text("#hit") == "80 %")
    assert page.text("#cross") == "40 %"
    assert page.js("return document.querySelectorAll('[role=treeitem]').length") == 5
    assert "planner" in page.text("#legend") and HOSTILE in page.text("#legend"), "a name is text, whatever it says"
    assert not page.js("return document.querySelector('main img')")
    assert page.js("return [...document.querySelectorAll('#modules tbody tr')].map((row) => row.cells[1].innerText)")
    assert page.js("return document.querySelectorAll('#ttft canvas, #ratio canvas').length") == 2
    assert "planner" in page.js("return document.querySelector('#ttft').getAttribute('aria-label')")
    cards = page.js("return [...document.querySelectorAll('#workers li')].map((card) => card.innerText)")
    assert len(cards) == 3 and all("ready" in card for card in cards)
    assert page.complaints() == []


def test_a_keyboard_reaches_every_node_and_stays_where_it_is(page: Page) -> None:
    page.open()
    page.js("document.querySelector('#worker').focus()")
    assert page.press("TAB") == 1, "one node is in the order of tabs"
    assert page.js("return document.querySelectorAll('[role=treeitem][tabindex=\"0\"]').length") == 1
    assert page.label.startswith("800 tokens; first computed for planner; read since by planner, coder,")
    assert page.press("DOWN") == 2 and "on loan" in page.label
    assert page.press("DOWN") == 3 and "held by a request" in page.label
    assert page.press("DOWN") == 3 and page.press("RIGHT") == 3, "there is nothing further"
    assert page.press("UP", "RIGHT") == 4 and HOSTILE in page.label and page.text("#detail").startswith("100 tokens")
    assert page.press("LEFT") == 2
    assert page.press("END") == 5 and page.press("HOME") == 1
    page.press("DOWN", "ENTER")
    assert page.js("return document.querySelectorAll('[role=treeitem]').length") == 3, "with what is above and below it"
    assert page.js(CONTRAST) == []
    assert page.text("#zoom-out") and page.press("ESCAPE") == 2 and not page.text("#zoom-out")
    # The tree changes while somebody is in it: the node keeps the focus; if it goes, its parent has it.
    more = [{**node, "tokens": node["tokens"] + 10} for node in TREE["nodes"] if node["id"] != 4]
    page.site.system.prefill[0].tree = {**TREE, "nodes": more}
    page.press("DOWN")
    page.until(lambda: page.label.startswith("210 tokens"))
    page.site.system.prefill[0].tree = {**TREE, "nodes": more[:2]}
    page.until(lambda: page.js("return document.querySelectorAll('[role=treeitem]').length") == 2)
    assert page.press("SHIFT") == 2
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_readable_in_light_and_dark_on_a_phone_and_on_a_desk(page: Page, scheme: str, width: int) -> None:
    page.site.ask("planner")
    page.open(width=width, scheme=scheme)
    background = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    assert page.js(CONTRAST) == []
    assert page.js("return document.documentElement.scrollWidth") <= width
    wide = (
        "return [...document.querySelectorAll('main *')].filter((e) => e.checkVisibility() && !e.closest('thead') && "
    )
    assert page.js(wide + "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)") == []
    assert page.complaints() == []


def test_nothing_moves_for_those_who_asked_for_that(page: Page) -> None:
    moves = "return getComputedStyle(document.querySelector('.node.new .span')).animationName"
    for number, motion, wanted in ((8, "no-preference", "come"), (9, "reduce", "none")):
        page.site.reset()
        page.open(motion=motion)
        grown = [*TREE["nodes"], {**TREE["nodes"][0], "id": number, "parent": 1, "read_by": []}]
        page.site.system.prefill[0].tree = {**TREE, "nodes": grown}
        page.until(lambda: bool(page.js("return document.querySelector('.node.new')")))
        assert page.js(moves) == wanted


def test_an_empty_tree_a_silent_worker_and_a_lost_router_are_said_so(page: Page) -> None:
    page.site.system.prefill[0].tree = described_tree()
    page.open()
    page.until(lambda: "The tree is empty" in page.text("#tree-note"))
    page.site.system.prefill[0].tree_behave = "broken"
    page.until(lambda: "answered 503" in page.text("#tree-note"))
    page.site.reset()
    page.until(lambda: page.text("#tree-note") == "" and "first computed for" in page.text("#detail"))
    assert page.complaints() == []
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    page.until(lambda: "does not answer; asking again" in page.text("#status"))
    assert "What is shown is of" in page.text("#status") and page.text("#detail")
    assert page.js(CONTRAST) == []
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
    page.until(lambda: page.text("#status") == "Live")
    assert all("ui/state" in line for line in page.complaints())


def test_another_workers_tree_can_be_chosen_and_stays_chosen(page: Page) -> None:
    page.site.system.decode["coder"][0].tree = described_tree([{"id": 7, "tokens": 42, "computed_for": 1}])
    page.open()
    from selenium.webdriver.support.select import Select

    choice = Select(page.driver.find_element("id", "worker"))
    assert [o.text for o in choice.options] == ["base (prefill)", "planner (decode)", "coder (decode)"]
    choice.select_by_visible_text("coder (decode)")
    page.until(lambda: page.text("#detail").startswith("42 tokens; first computed for coder"))
    asked = len(page.site.system.decode["coder"][0].tree_asked)
    page.until(lambda: len(page.site.system.decode["coder"][0].tree_asked) > asked)
    assert page.text("#detail").startswith("42 tokens")
    assert page.complaints() == []
