"""The page in a real browser: Chromium without a window, driven through its own driver."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from chromium import chromium, logged, needs_browser
from local_gateway import LocalEngines, data_url, png, running_gateway
from page_browser import Browser, picture
from PIL import Image, ImageChops
from scripted_endpoint import Endpoint, endpoint
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from jobs.shortcuts import CAPTION, OCR
from pipeline.endpoint.options import EndpointOptions
from pipeline.engine_worker import EngineWorker
from pipeline.job import EngineOptions, Model
from pipeline.page import load_page


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def browser(driver: webdriver.Chrome) -> Iterator[Browser]:
    for kind in ("browser", "performance"):
        logged(driver, kind)  # what earlier tests left there
    yield Browser(driver)
    driver.get("about:blank")


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint() as served:
        yield served


def content(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The one message of a request."""
    (message,) = request["messages"]
    assert message["role"] == "user"
    parts: list[dict[str, Any]] = message["content"]
    return parts


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return Model(str(tiny_checkpoint), dtype="float32")


@pytest.fixture(scope="module")
def engines(model: Model) -> Iterator[LocalEngines]:
    worker = EngineWorker(model, EngineOptions(threads=1))
    yield LocalEngines(worker)
    worker.close()


def test_one_document_with_a_policy_that_allows_itself_alone() -> None:
    page = load_page()
    assert '<link rel="stylesheet"' not in page.html
    assert "<script src" not in page.html
    assert "http://www.w3.org/2000/svg" in page.html  # the name of a format, never fetched
    assert page.html.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in page.policy


def test_the_tasks_are_those_of_the_command_line() -> None:
    script = load_page().html
    for task in (CAPTION, OCR):
        assert f'prompt: "{task["prompt"]}", limit: {task["max_new_tokens"]}' in script


@needs_browser
def test_a_dropped_picture_is_described_with_its_tiles(browser: Browser, server: Endpoint) -> None:
    server.gate.clear()
    browser.open(server.url)
    browser.wait_for("#server", "SmolVLM-test")
    dropped = picture()
    browser.give(dropped)
    browser.wait_for("figcaption", "160 × 120")
    before = browser.screenshot()
    browser.click("#caption")

    browser.wait_for("article .text", "Two")  # streamed: the rest is still held back
    assert browser.text("article .text") == "Two"
    assert not browser.one("#tiles").is_displayed()
    assert browser.one("#stop").is_displayed()
    server.gate.set()
    browser.wait_until_answered()

    assert browser.text("article .text") == "Two cats & a <b>dog</b>."
    assert [cell.text for cell in browser.all("#tiles i")] == [f"{r}·{c}" for r in (1, 2, 3) for c in (1, 2, 3, 4)]
    costs = browser.costs()
    assert (costs["tokens out"], costs["tokens in, 832 cached"], costs["tiles"]) == ("3", "877", "13")
    assert 0 < float(costs["first token"].removesuffix(" s")) <= float(costs["in total"].removesuffix(" s"))
    assert float(costs["tokens/s"]) > 0

    (request,) = server.asked
    url = f"data:image/png;base64,{dropped[2]}"
    expected = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": CAPTION["prompt"]}]
    assert content(request) == expected
    assert {"model": "SmolVLM-test", "max_tokens": 128, "stream": True}.items() <= request.items()
    assert request["stream_options"] == {"include_usage": True}

    assert browser.hosts() == {urlsplit(server.url).netloc}
    assert browser.console() == []
    shot = browser.screenshot()
    assert_lines_are_drawn(browser, before, shot)
    if "SCREENSHOTS" in os.environ:
        shot.save(Path(os.environ["SCREENSHOTS"]) / "page.png")


def assert_lines_are_drawn(browser: Browser, before: Image.Image, after: Image.Image) -> None:
    """The picture is one colour, so whatever changed on it is the overlay: lines along every border between tiles."""
    box = browser.one("#frame").rect
    left, top, width, height = (int(box[name]) for name in ("x", "y", "width", "height"))
    area = (left, top, left + width, top + height)
    changed = ImageChops.difference(before.crop(area), after.crop(area)).convert("L").point(lambda v: 255 * (v > 40))
    assert changed.getbbox() is not None
    for col in (1, 2, 3):
        x = round(col * width / 4)
        assert changed.crop((x - 3, height // 2, x + 3, height // 2 + 10)).getbbox() is not None, f"no line at {x}"
    middle = (round(0.4 * width / 4), round(0.6 * height / 3), round(0.6 * width / 4), round(0.8 * height / 3))
    assert changed.crop(middle).getbbox() is None


@needs_browser
def test_several_pictures_go_along_in_order_and_can_be_taken_away(browser: Browser, server: Endpoint) -> None:
    server.tiles = [
        {"rows": 0, "cols": 0, "width": 50, "height": 40},
        {"rows": 2, "cols": 1, "width": 10, "height": 20},
    ]
    browser.open(server.url)
    first, second, third = (picture(f"{color}.png", color=color) for color in ("red", "green", "blue"))
    browser.give(first, second)
    browser.give(third, event="paste")
    browser.click("[aria-label='Remove picture 2, green.png']")
    browser.one("#question").send_keys("Which is larger?", Keys.ENTER)
    browser.wait_until_answered()

    urls = [part["image_url"]["url"] for part in content(server.asked[0])[:-1]]
    assert urls == [f"data:image/png;base64,{each[2]}" for each in (first, third)]
    assert content(server.asked[0])[-1] == {"type": "text", "text": "Which is larger?"}
    assert browser.text("article h2") == "Which is larger?"
    assert [cell.text for cell in browser.all("#tiles i")] == ["1·1", "2·1"]  # of the blue one, which is shown
    assert "10 × 20" in browser.text("figcaption")
    browser.click("[aria-label='Show picture 1, red.png']")
    assert "one tile" in browser.text("figcaption")
    assert browser.all("#tiles i") == []
    assert browser.costs()["tiles"] == "4"


@needs_browser
def test_it_is_used_with_the_keyboard_alone(browser: Browser, server: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "chosen.png"
    Image.new("RGB", (40, 40), "navy").save(file)
    browser.open(server.url)
    reached = []
    for _ in range(6):
        webdriver.ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        active = browser.driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.tag_name)
    assert reached == ["summary", "files", "caption", "ocr", "question", "send"]
    browser.one("#files").send_keys(str(file))
    browser.one("#ocr").send_keys(Keys.ENTER)
    browser.wait_until_answered()
    assert content(server.asked[0])[-1]["text"] == OCR["prompt"]
    assert server.asked[0]["max_tokens"] == 1024
    assert browser.driver.switch_to.active_element.get_attribute("id") == "ocr"
    server.gate.clear()
    browser.one("#question").send_keys("Why?", Keys.TAB)
    webdriver.ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    browser.wait_for("article .text", "Two")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "stop"
    webdriver.ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    browser.wait_for("article .note", "Stopped.")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "send"
    server.gate.set()
    browser.one("#toggle").send_keys(Keys.SPACE)
    assert not browser.one("#tiles").is_displayed()


@needs_browser
def test_names_and_answers_are_text_never_markup(browser: Browser, server: Endpoint) -> None:
    evil = "<img src=x onerror=alert(1)>"
    server.pieces = [evil, "<script>alert(2)</script>", "\n&amp;"]
    browser.open(server.url)
    browser.give(picture(f"{evil}.png"))
    browser.one("#question").send_keys(evil, Keys.ENTER)
    browser.wait_until_answered()
    assert browser.text("article .text") == f"{evil}<script>alert(2)</script>\n&amp;"
    assert browser.text("article h2") == evil
    assert browser.text("#name") == f"{evil}.png"
    assert browser.console() == []


@needs_browser
@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"refuse": (400, "image 1 is truncated", {})}, "image 1 is truncated"),
        ({"refuse": (413, "The body is above 20 MB.", {})}, "Too large for this server. The body is above 20 MB."),
        ({"refuse": (429, "The queue is full.", {"retry-after": "5"})}, "The server is busy; try again in 5 s."),
        ({"refuse": (503, "No engine.", {"retry-after": "2"})}, "No engine can answer now; try again in 2 s."),
        ({"break_off": True}, "The answer broke off"),
        ({"finish_reason": "length"}, "Cut off at the token limit"),
        ({"finish_reason": "repetition"}, "Stopped because it went in circles."),
        ({"pieces": [""]}, "The model ended its answer without a word."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_goes_wrong_is_said(browser: Browser, settings: dict[str, Any], shown: str) -> None:
    with endpoint(**settings) as server:
        browser.open(server.url)
        browser.give(picture())
        browser.click("#caption")
        browser.wait_until_answered()
        assert shown in browser.text("article .note")
        assert browser.one("#send").is_displayed()
        assert browser.one("#caption").get_attribute("aria-disabled") == "false"


@needs_browser
def test_a_server_that_is_gone_and_a_file_that_is_no_picture_are_said(browser: Browser) -> None:
    with endpoint() as server:
        browser.open(server.url)
        browser.wait_for("#server", "SmolVLM-test")
        browser.click("#caption")
        assert browser.text("#problem") == "Add a picture first."
        browser.give(("notes.pdf", "application/pdf", ""))
        assert browser.text("#problem") == "“notes.pdf” is not a picture."
        browser.give(picture())
        assert not browser.one("#problem").is_displayed()
    browser.click("#caption")
    browser.wait_for("article .note", "The server does not answer.")


@needs_browser
def test_stopping_keeps_what_was_said_and_tells_the_server(browser: Browser, server: Endpoint) -> None:
    server.gate.clear()
    browser.open(server.url)
    browser.give(picture())
    browser.click("#caption")
    browser.wait_for("article .text", "Two")
    browser.click("#stop")
    browser.wait_for("article .note", "Stopped.")
    assert browser.text("article .text") == "Two"
    assert server.went_away.wait(10)
    server.gate.set()
    browser.click("#caption")
    browser.wait_until_answered()
    assert browser.text("article .text") == "Two cats & a <b>dog</b>."


@needs_browser
def test_the_key_is_asked_for_and_kept_in_memory_only(browser: Browser) -> None:
    with endpoint(key="sk-secret") as server:
        browser.open(server.url)
        browser.wait_for("#server", "needs an API key")
        assert browser.driver.switch_to.active_element.get_attribute("id") == "key"
        browser.one("#key").send_keys("sk-secret", Keys.ENTER)
        browser.wait_for("#server", "SmolVLM-test")
        browser.one("#key").send_keys(Keys.ESCAPE)
        browser.give(picture())
        browser.click("#caption")
        browser.wait_until_answered()
        assert browser.text("article .text") == "Two cats & a <b>dog</b>."
        kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.search + location.hash]"
        assert browser.driver.execute_script(kept) == [0, 0, "", ""]
        browser.driver.refresh()
        browser.wait_for("#server", "needs an API key")
        assert browser.one("#key").get_property("value") == ""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, server: Endpoint, scheme: str) -> None:
    browser.open(server.url, width=360, height=740, scheme=scheme)
    browser.give(picture("a name that is much too long for the width of a telephone.png", (1600, 300)))
    browser.click("#caption")
    browser.wait_until_answered()
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 360
    grey = np.asarray(browser.screenshot().convert("L"))[2, 2]
    assert grey > 200 if scheme == "light" else grey < 50
    if "SCREENSHOTS" in os.environ:
        browser.screenshot().save(Path(os.environ["SCREENSHOTS"]) / f"phone_{scheme}.png")


@needs_browser
def test_with_the_real_gateway_the_answer_is_the_engines(browser: Browser, model: Model, engines: LocalEngines) -> None:
    with running_gateway(EndpointOptions(model), engines) as gateway:
        browser.open(gateway.url)
        browser.wait_for("#server", model.id.rpartition("/")[2])
        browser.click("summary")
        browser.one("#limit").send_keys("12", Keys.ESCAPE)
        browser.give(picture("wide.png", (120, 60)), picture("small.png", (20, 20)))
        browser.one("#question").send_keys("What is this?", Keys.ENTER)
        browser.wait_until_answered()
        answer, costs = browser.text("article .text"), browser.costs()
        content = [
            {"type": "image_url", "image_url": {"url": data_url(png(*size, "teal"))}} for size in ((120, 60), (20, 20))
        ]
        content.append({"type": "text", "text": "What is this?"})
        body = {"model": browser.text("#server"), "messages": [{"role": "user", "content": content}], "max_tokens": 12}
        asked = httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer.split() == asked["choices"][0]["message"]["content"].split()
        assert costs["tokens out"] == str(asked["usage"]["completion_tokens"])
        assert costs["tiles"] == str(sum(grid["rows"] * grid["cols"] + 1 for grid in asked["smolvlm"]["tiles"]))
        browser.click("[aria-label='Show picture 1, wide.png']")
        assert len(browser.all("#tiles i")) == 8
        assert "120 × 60" in browser.text("figcaption")
        assert (browser.hosts(), browser.console()) == ({urlsplit(gateway.url).netloc}, [])

        browser.give(("cut.png", "image/png", base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()))
        browser.click("#caption")
        browser.wait_for("article .note", "Picture 3: the image file is cut short")


@needs_browser
def test_a_gateway_with_keys_takes_the_one_that_the_browser_asked_for(
    browser: Browser, model: Model, engines: LocalEngines, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-0123456789abcdef\n")
    with running_gateway(EndpointOptions(model), engines, keys) as gateway:
        assert httpx2.get(gateway.url).status_code == 401
        browser.open(gateway.url.replace("://", "://user:sk-0123456789abcdef@"))
        browser.wait_for("#server", model.id.rpartition("/")[2])
        browser.click("summary")
        browser.one("#limit").send_keys("3", Keys.ESCAPE)
        browser.give(picture())
        browser.click("#caption")
        browser.wait_until_answered()
        assert browser.costs()["tokens out"] == "3"
        assert browser.console() == []
