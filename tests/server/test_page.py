"""The web page in headless Chromium: files, the microphone, keyboard, a phone's width."""

import base64
import io
import shutil
import threading
from difflib import SequenceMatcher

import numpy as np
import pytest
import soundfile as sf
import srt

from inference.through import Through
from tests.recipes.causal import speech
from tests.recipes.packages import RATE, SENTENCES, said
from tests.server.servers import WAIT, recognizer, served, shared, until

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
)
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1], {type: "audio/wav"}));
document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
"""


@pytest.fixture(scope="module")
def spoken():
    """What the microphone hears: two sentences, then silence."""
    x, texts = speech(2)
    return np.concatenate([x, np.zeros(30 * RATE, np.float32)]), texts


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(spoken, downloads, tmp_path_factory):
    heard = tmp_path_factory.mktemp("microphone") / "heard.wav"
    sf.write(heard, spoken[0], RATE, subtype="PCM_16")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"),
        "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream",
        f"use-file-for-fake-audio-capture={heard}%noloop",
        # Nothing but this machine can be reached.
        "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    browser.get_log("browser")  # what other tests provoked
    yield opened(browser, shared().url)
    wrong = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not wrong


def opened(browser, url, width=1200):
    browser.set_window_size(width, 900)
    browser.get(url)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def find(page, selector):
    return page.find_element("css selector", selector)


def texts(page, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return page.execute_script(script, selector)


def keys(page, *pressed):
    for key in pressed:
        webdriver.ActionChains(page, duration=0).send_keys(key).perform()


def send(page, x, name="talk.wav"):
    file = io.BytesIO()
    sf.write(file, x, RATE, format="WAV")
    page.execute_script(DROP, base64.b64encode(file.getvalue()).decode(), name)


def drop(page, text, name="talk.wav", **silence):
    send(page, said(text, **silence), name)
    until(lambda: " words in " in find(page, "#status").text)
    until(lambda: texts(page, ".track .words span"))


def saved(page, path):
    """The cues of the file that a click on the link saves."""
    find(page, "#srt").click()
    until(path.is_file)
    return list(srt.parse(path.read_text(), ignore_errors=False))


def drawn(page):
    """The part of the waveform's pixels that are not empty."""
    return page.execute_script(
        """const c = document.querySelector("canvas");
        const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return p.filter((v, i) => i % 4 == 3 && v).length / (c.width * c.height);"""
    )


def overflow(page):
    """Pixels by which the page is wider than its window."""
    return page.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def test_a_dropped_file(page, downloads):
    drop(page, SENTENCES[0])
    words = SENTENCES[0].split()
    assert texts(page, "#text span") == texts(page, ".track .words span") == words
    assert drawn(page) > 0.03
    # The words lie over their sound.
    places = page.execute_script(
        """const w = document.querySelector(".track").offsetWidth;
        return [...document.querySelectorAll(".track .words span")].map(e => e.offsetLeft / w)"""
    )
    letters = [SENTENCES[0].index(w) for w in words]
    assert places == pytest.approx([i / len(SENTENCES[0]) for i in letters], abs=0.08)
    (cue,) = saved(page, downloads / "talk.srt")
    assert cue.content == SENTENCES[0]
    assert cue.end.total_seconds() == pytest.approx(1.44, abs=0.1)


def test_text_shows_while_a_file_is_heard(browser, monkeypatch):
    whole, go = Through.push, threading.Event()

    def push(self, samples):
        assert self.seconds < 4 or go.wait(WAIT)
        whole(self, samples)

    monkeypatch.setattr(Through, "push", push)
    monkeypatch.setattr(recognizer(), "whole_seconds", 60)
    x, sentences = speech(3)
    words = " ".join(sentences).split()
    with served() as service:
        page = opened(browser, service.url)
        send(page, x)
        # Words come until 4 s are heard, also between two looks at the page.
        until(lambda: texts(page, "#text span") == texts(page, ".track .words span") != [])
        shown = texts(page, "#text span")
        assert 0 < len(shown) < len(words) and shown == words[: len(shown)]
        assert "Transcribing" in find(page, "#status").text
        assert find(page, "#srt").get_attribute("aria-disabled") == "true"
        go.set()
        until(lambda: f"{len(words)} words in" in find(page, "#status").text)
        assert texts(page, "#text span") == words and not texts(page, "#text .maybe")


def test_a_chosen_file_that_is_no_sound(page, tmp_path):
    (tmp_path / "notes.wav").write_text("no sound" * 100)
    find(page, "#file").send_keys(str(tmp_path / "notes.wav"))
    until(lambda: "notes.wav is no audio" in find(page, "#error").text)
    wrong = [e["message"] for e in page.get_log("browser") if e["level"] == "SEVERE"]
    assert all("415" in w or "blob:" in w for w in wrong)
    drop(page, SENTENCES[1])
    assert not find(page, "#error").is_displayed()


def test_the_keyboard_alone(page):
    drop(page, SENTENCES[2])
    find(page, "body").click()
    reached = []
    for _ in range(10):
        keys(page, "\ue004")  # tab
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
    assert {"file", "speak", "wave", "play", "copy", "srt", "BED"} <= set(reached)
    page.execute_script("document.querySelector('#text span').focus()")
    keys(page, "\ue014", "\ue014")  # right
    assert page.switch_to.active_element.text == "BEAD"
    assert texts(page, "#text .now") == texts(page, ".track .now") == ["BEAD"]
    start = page.execute_script("return document.querySelector('audio').currentTime")
    assert start == pytest.approx(0.96, abs=0.1)
    page.execute_script("document.querySelector('#wave').focus()")
    keys(page, "\ue011")  # home
    assert find(page, "#time").text == "0:00.0"
    keys(page, " ")
    until(lambda: page.execute_script("return document.querySelector('audio').currentTime > 0.2"))


def test_speech_while_it_is_spoken(page, spoken, downloads):
    find(page, "body").send_keys("r")
    until(lambda: texts(page, "#text .maybe"))  # partial text
    until(lambda: len(texts(page, "#text span:not(.maybe)")) >= 5)
    assert find(page, "#speak").get_attribute("aria-pressed") == "true"
    find(page, "#speak").click()
    until(lambda: " words in " in find(page, "#status").text)
    # Two resamplings and a start at any moment: nearly the words, of a model so small.
    text = " ".join(texts(page, "#text span"))
    assert SequenceMatcher(None, text, " ".join(spoken[1])).ratio() > 0.85
    assert drawn(page) > 0.001
    assert page.execute_script("return document.querySelector('audio').duration") > 4
    cues = saved(page, downloads / "speech.srt")
    assert len(cues) == 2 and " ".join(c.content for c in cues) == text


def test_a_model_that_cannot_stream_records_first(browser, spoken, monkeypatch):
    monkeypatch.setattr(recognizer().normalize, "norm_type", "sentence")
    with served() as service:
        monkeypatch.undo()
        page = opened(browser, service.url)
        find(page, "#speak").click()
        until(lambda: "Recording" in find(page, "#status").text)
        until(
            lambda: page.execute_script("return document.querySelector('#wave').ariaValueMax > 3")
        )
        find(page, "#speak").click()
        until(lambda: " words in " in find(page, "#status").text)
        assert set(texts(page, "#text span")) & set(" ".join(spoken[1]).split())


def test_a_key_is_asked_for(browser):
    with served(api_key="secret") as service:
        page = opened(browser, service.url)
        page.execute_script(DROP, base64.b64encode(b"x").decode(), "a.wav")
        until(lambda: "API key is missing or wrong" in find(page, "#error").text)
        find(page, "#key").send_keys("secret")
        drop(page, SENTENCES[0])
        assert texts(page, "#text span") == SENTENCES[0].split()


@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_and_brings_all_it_needs(page, width, tmp_path):
    opened(page, shared().url, width)
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    drop(page, SENTENCES[0], name="a-rather-long-name-of-a-recording-of-a-talk.wav", after=6)
    page.save_screenshot(str(tmp_path / f"page-{width}.png"))
    assert overflow(page) <= 0
    assert (
        page.execute_script("return document.querySelector('#wave').scrollWidth") >= 120 * 7
    )  # long ones scroll
    sources = page.execute_script("return performance.getEntries().map(e => e.name)")
    assert all(s.startswith((shared().url, "blob:")) for s in sources if "://" in s)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
