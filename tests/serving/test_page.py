"""The page in a real browser, against the whole server in this process, with the bundled model."""

import contextlib
import io
import json
import shutil
import threading
import time

import av
import cv2
import numpy as np
import pytest
import uvicorn
from serving.small_server import PROMPT, assemble

import adastate_jax as ada

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds, of whatever is waited for

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    app, live, _ = assemble(ada.load("tiny"), folder / "live")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        assert not live.trouble
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a tab with a storage of its own; no tab may have had an error of its scripts at the end."""
    errors = []
    with contextlib.ExitStack() as stack:

        def open_page(path="", **settings):
            context = stack.enter_context(contextlib.closing(browser.new_context(**settings)))
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address + path)
            return page

        yield open_page
    assert errors == []


def stop(page):
    page.click("#stop")
    page.wait_for_selector("body[data-state=ended]")


def session_of(page, address) -> dict:
    """The session's file, so far."""
    return page.request.get(address.rstrip("/") + page.get_attribute("#session", "href")).json()


def drawn(page) -> list[int]:
    """A sum over the pixels of every panel."""
    return page.evaluate(
        """[...document.querySelectorAll('#panels canvas')].map((canvas) => {
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          return data.reduce((sum, value, i) => i % 4 === 3 ? sum : sum + value, 0);
        })"""
    )


def mean_colour(page) -> list[float]:
    """Red, green and blue, 0 to 255, of the last panel."""
    return page.evaluate(
        """(() => {
          const canvas = [...document.querySelectorAll('#panels canvas')].at(-1);
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          const sums = [0, 0, 0, 0];
          data.forEach((value, i) => sums[i % 4] += value);
          return sums.slice(0, 3).map((sum) => sum / (data.length / 4));
        })()"""
    )


def wait_until(page, holds):
    deadline = time.monotonic() + PATIENCE / 1000
    while not holds():
        assert time.monotonic() < deadline, page.inner_text("body")
        time.sleep(0.1)


def wait_until_drawn(page):
    page.wait_for_selector("body[data-state=running]")
    wait_until(page, lambda: drawn(page) and all(drawn(page)))


def test_a_person_sees_steers_and_keeps(open_page, address):
    """Moving pictures before anybody types; a prompt is applied; what was seen comes as a video and as a session."""
    page = open_page()
    wait_until_drawn(page)
    assert page.locator("#panels figure").count() == 2
    first = drawn(page)
    page.wait_for_selector("body[data-motion]")
    wait_until(page, lambda: all(now != before for now, before in zip(drawn(page), first, strict=True)))

    for scene, more, less in (("green hills", 1, 0), ("sand dunes", 0, 1)):
        page.fill("#prompt", f"a camera pans left over {scene}")
        page.select_option("#transition", "cut")
        page.click("#send")
        page.wait_for_selector(f"#timeline li.applied.current >> text={scene}")
        wait_until(page, lambda more=more, less=less: (colour := mean_colour(page))[more] > colour[less] + 10)
    stop(page)
    assert "stopped" in page.inner_text("#overlay-text").lower()

    video = page.request.get(address.rstrip("/") + page.get_attribute("#video", "href")).body()
    with av.open(io.BytesIO(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) > 0
    said = json.dumps(session_of(page, address))
    assert PROMPT in said
    assert "over sand dunes" in said


def test_a_page_that_is_loaded_again_comes_back_to_its_session(open_page):
    page = open_page()
    wait_until_drawn(page)
    before = page.get_attribute("#video", "href")
    page.reload()
    wait_until_drawn(page)
    assert page.get_attribute("#video", "href") == before
    stop(page)


def test_the_second_of_two_tabs_waits_for_its_turn_and_a_watch_link_does_not(open_page):
    page = open_page()
    wait_until_drawn(page)
    waiting = open_page()
    waiting.wait_for_selector("#overlay-title >> text=You are number 1 in the queue")

    watcher = open_page(page.evaluate("new URL(document.querySelector('#share').dataset.link).hash"))
    watcher.wait_for_selector("body[data-role=watch]")
    wait_until_drawn(watcher)
    assert watcher.is_hidden("#steer")

    stop(page)
    watcher.wait_for_selector("body[data-state=ended]")
    wait_until_drawn(waiting)
    stop(waiting)


def test_the_keyboard_alone_steers(open_page):
    page = open_page()
    wait_until_drawn(page)
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-state=paused]")
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-state=running]")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("typed")
    page.keyboard.press("Enter")
    page.wait_for_selector("#timeline li.applied >> text=typed")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    page.wait_for_selector("#timeline li.applied >> text=seed 1")
    stop(page)


def test_a_phone_scrolls_down_and_not_sideways(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    wait_until_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Whatever can be pressed has a name that a screen reader says.
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, select, textarea, input, a')].filter((element) =>
          !element.hidden && !element.textContent.trim() &&
          !element.getAttribute('aria-label') && !element.labels?.length
        ).map((element) => element.id)"""
    )
    assert unnamed == []
    stop(page)


def test_another_anchor_or_a_start_picture_begins_anew(open_page, address, tmp_path):
    """A take begins with other anchors, one panel, or a picture that was sent; what is no picture is refused."""
    page = open_page()
    wait_until_drawn(page)
    page.locator("#panels select").nth(1).select_option("longlive")
    page.wait_for_selector("#timeline li.applied >> text=beside longlive")
    wait_until_drawn(page)
    page.locator("#panels select").nth(0).select_option("-")
    wait_until(page, lambda: page.locator("#panels figure").count() == 1)
    wait_until_drawn(page)

    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.full((40, 60, 3), 180, np.uint8))
    page.set_input_files("#picture", picture)
    page.wait_for_selector("#timeline li.applied >> text=from a picture")
    # What is drawn may be the take's before: the session has a take once its first chunk is made.
    wait_until(page, lambda: session_of(page, address)["takes"][-1]["picture"] is not None)

    picture.write_text("no picture")
    page.set_input_files("#picture", picture)
    page.wait_for_selector("#status >> text=refused")
    stop(page)
    file = session_of(page, address)
    panels = [[panel["anchor"] for panel in take["panels"]] for take in file["takes"]]
    assert panels[:2] == [["static", "adastate"], ["static", "longlive"]]
    assert panels[-1] == ["longlive"]
    assert [take["picture"] is not None for take in file["takes"]] == [*[False] * (len(panels) - 1), True]
