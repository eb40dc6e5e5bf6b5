"""The page in a real browser: Chromium of Debian, driven by Selenium, on the digits recipe."""

import importlib.util
import io
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from causvid_jax import media
from causvid_jax.sampling import script
from causvid_jax.serve.film import replay
from tests.serve.conftest import Server

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
WEBRTC = importlib.util.find_spec("aiortc") is not None
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (apt-get install chromium-driver)"
)
PICTURES = pathlib.Path(os.environ.get("PAGE_PICTURES", "/nowhere"))


@pytest.fixture
def page(digits, tmp_path):
    """Return a browser with the page of a running server."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Server(digits, tmp_path / "recordings", sessions=4, webrtc=WEBRTC) as live:
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        try:
            browser.live, browser.folder = live, tmp_path
            browser.get(live.url)
            until(lambda: browser.execute_script("return film.player.hello"), "a connection")
            yield browser
        finally:
            browser.quit()


def until(condition, what, seconds=30):
    """Wait until ``condition()`` holds and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} has not happened within {seconds} s")


def pixels(page):
    """Return what the film shows, on its canvas or in its video, uint8 ``[32, 32, 3]``."""
    data = page.execute_script(
        "let c = document.querySelector('.film canvas'); const v = document.querySelector('.film video');"
        "if (v.srcObject) { c = new OffscreenCanvas(32, 32); c.getContext('2d').drawImage(v, 0, 0, 32, 32); }"
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data);"
    )
    return np.array(data, np.uint8).reshape(32, 32, 4)[..., :3]


def color(page):
    """Return mean red, green and blue of what is bright."""
    frame = pixels(page).astype(float)
    bright = frame[frame.max(-1) > 100]
    return bright.mean(0) if len(bright) > 10 else np.zeros(3)


def is_color(page, index):
    mean = color(page)
    return mean[index] > 120 and mean[index] > 2 * max(np.delete(mean, index))


def caption(page):
    return page.find_element(By.CSS_SELECTOR, ".film .caption").text


def click(page, name):
    page.find_element(By.ID, name).click()


def picture(page, name):
    if PICTURES.is_dir():
        page.save_screenshot(str(PICTURES / f"{name}.png"))


def no_errors(page):
    messages = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not messages, messages


def test_the_prompt_changes_the_film(page):
    until(lambda: is_color(page, 0), "a red film")
    assert caption(page) == "a red 3 moving left"
    one = pixels(page)
    until(lambda: np.any(pixels(page) != one), "movement")
    box = page.find_element(By.ID, "prompt")
    box.clear()
    box.send_keys("a gre")
    until(lambda: page.find_elements(By.CSS_SELECTOR, "#suggestions li"), "suggestions")
    picture(page, "suggestions")
    box.send_keys(Keys.TAB, "7 moving up", Keys.ENTER)
    until(lambda: is_color(page, 1), "a green film")
    assert caption(page) == "a green 7 moving up"
    box.clear()
    box.send_keys("a purple 3", Keys.ENTER)
    until(lambda: "purple" in page.find_element(By.ID, "error").text, "a sentence about the word")
    box.send_keys(Keys.ESCAPE)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_DOWN)
    until(lambda: caption(page) == "a green 7 moving down", "steering by an arrow key")
    delay = float(until(lambda: page.find_element(By.ID, "figure-delay").text.removesuffix(" s").strip("–"), "a delay"))
    assert 0 < delay < 5
    picture(page, "light")
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 1700, "deviceScaleFactor": 1, "mobile": True}
    )
    picture(page, "phone_dark")
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
    no_errors(page)


def test_record_download_snapshot_and_replay(page, digits):
    until(lambda: is_color(page, 0), "a red film")
    click(page, "record")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    until(lambda: "right" in caption(page), "steering")
    click(page, "snapshot")
    until(lambda: "Snapshot" in page.find_element(By.ID, "kept").text, "a snapshot")
    click(page, "record")
    until(lambda: page.find_elements(By.CLASS_NAME, "download"), "a recording")[0].click()
    file = until(lambda: next(iter(page.folder.glob("*.mp4")), None), "a download")
    until(lambda: not list(page.folder.glob("*.crdownload")), "the end of the download")
    written = script.read_script(file)
    assert len(media.read_video(file, 32, 32)) == sum(map(len, replay(digits, written)))
    beside = [b for b in page.find_elements(By.CSS_SELECTOR, "#kept button") if b.text == "Beside it"]
    beside[0].click()
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, ".film")) == 2, "a film beside it")
    page.find_elements(By.CSS_SELECTOR, ".film")[1].click()  # the fork is steered, the first film is not
    page.find_element(By.CSS_SELECTOR, "#colors [data-word=green]").click()
    captions = until(lambda: page.find_elements(By.CSS_SELECTOR, ".film .caption"), "captions")
    until(lambda: captions[1].text == "a green 3 moving right", "a green fork")
    assert captions[0].text == "a red 3 moving right"
    page.find_elements(By.CSS_SELECTOR, ".film")[0].click()
    time.sleep(1.5)
    picture(page, "side_by_side")
    click(page, "link")
    link = until(lambda: page.find_elements(By.CLASS_NAME, "replay"), "a link")[0].get_attribute("href")
    page.switch_to.new_window("tab")
    page.get(link)
    until(lambda: "identical" in page.find_element(By.ID, "error").text, "an identical replay", 60)
    no_errors(page)


def test_h264_picture_camera_and_a_lost_connection(page, tmp_path):
    until(lambda: is_color(page, 0), "a red film")
    frames = np.zeros((64, 64, 3), np.uint8)
    frames[16:48, 28:36] = 0, 0, 255
    Image.fromarray(frames).save(tmp_path / "blue.png")
    page.find_element(By.ID, "picture").send_keys(str(tmp_path / "blue.png"))
    until(lambda: is_color(page, 2), "the picture")
    click(page, "camera")
    until(lambda: page.find_element(By.ID, "camera").get_attribute("aria-pressed") == "true", "the camera")
    time.sleep(2)
    picture(page, "camera")
    click(page, "unfollow")
    page.execute_script("film.player.connection.socket.close()")
    shown = page.execute_script("return film.player.connection.received")
    until(lambda: page.execute_script("return film.player.connection.received") > shown + 2, "the film going on")
    page.find_element(By.CSS_SELECTOR, "#format option[value=mp4]").click()
    until(lambda: page.execute_script("return document.querySelector('.film video').currentTime") > 1.5, "H.264", 60)
    picture(page, "h264")
    no_errors(page)


def test_a_picture_that_is_larger_than_a_message_is_a_sentence_and_the_film_goes_on(page, tmp_path):
    until(lambda: is_color(page, 0), "a red film")
    noise = np.random.default_rng(0).integers(0, 256, (1250, 1250, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > page.live.settings.message_bytes
    page.find_element(By.ID, "picture").send_keys(str(tmp_path / "noise.png"))
    said = until(lambda: page.find_element(By.ID, "error").text, "a sentence")
    assert said == "The picture has 4.5 MiB; accepted: 4.0 MiB."
    shown = page.execute_script("return film.player.connection.received")
    until(lambda: page.execute_script("return film.player.connection.received") > shown + 2, "the film going on")
    no_errors(page)


def test_what_is_asked_for_while_the_connection_is_lost_is_sent_afterwards(page):
    """Each script runs at once, so the page does not see the server's answer between its lines."""
    until(lambda: is_color(page, 0), "a red film")
    lose = "const { connection } = film.player; connection.socket.close();"
    page.execute_script(lose + "document.querySelector('#colors [data-word=blue]').click();"
                        "document.querySelector('#colors [data-word=green]').click();")  # fmt: skip
    until(lambda: is_color(page, 1), "a green film")
    assert caption(page) == "a green 3 moving left"
    page.execute_script("film.player.connection.socket.send = () => {};"  # the network is gone, and no one knows
                        "document.querySelector('#colors [data-word=blue]').click();" + lose)  # fmt: skip
    until(lambda: is_color(page, 2), "a blue film")
    (session,) = page.live.engine.sessions()
    click(page, "pause")
    until(lambda: session.paused, "a pause")
    page.execute_script(lose + "document.getElementById('pause').click();")
    until(lambda: not session.paused, "the end of the pause")
    page.execute_script(lose + "document.getElementById('seed').value = 7; document.getElementById('restart').click();")
    until(lambda: session.film.seed == 7 and is_color(page, 2), "another film")
    assert page.live.engine.sessions() == [session]
    no_errors(page)


def test_a_connection_is_taken_up_before_anything_else_is_sent(page):
    """A server refuses a first message of another kind, which ended the film."""
    until(lambda: is_color(page, 0), "a red film")
    page.execute_script(
        "const { connection } = film.player, { connect } = Object.getPrototypeOf(connection);"
        "connection.connect = () => {"
        "  connect.call(connection);"
        "  connection.socket.onopen = () => film.player.send({ type: 'pull', upto: 0, received: 0 });"
        "};"
        "connection.socket.close();"
    )
    shown = page.execute_script("return film.player.connection.received")
    until(lambda: page.execute_script("return film.player.connection.received") > shown + 2, "the film going on")
    no_errors(page)


@pytest.mark.skipif(not WEBRTC, reason="aiortc is not installed (pip install 'causvid_jax[webrtc]')")
def test_webrtc_shows_the_film_and_takes_up_a_lost_connection(page):
    until(lambda: is_color(page, 0), "a red film")
    page.find_element(By.CSS_SELECTOR, "#format option[value=webrtc]").click()
    until(lambda: page.execute_script("return document.querySelector('.film video').currentTime") > 0.5, "WebRTC")
    until(lambda: is_color(page, 0), "a red film by WebRTC")
    one = pixels(page)
    until(lambda: np.any(pixels(page) != one), "movement")
    page.find_element(By.CSS_SELECTOR, "#colors [data-word=green]").click()
    until(lambda: is_color(page, 1), "a green film by WebRTC")
    assert caption(page) == "a green 3 moving left"
    picture(page, "webrtc")
    page.execute_script("film.player.connection.socket.close()")
    shown = page.execute_script("return film.player.connection.received")
    until(lambda: page.execute_script("return film.player.connection.received") > shown + 2, "the film going on")
    page.find_element(By.CSS_SELECTOR, "#colors [data-word=blue]").click()
    until(lambda: is_color(page, 2), "a blue film by WebRTC")
    page.find_element(By.CSS_SELECTOR, "#format option[value=webp]").click()
    until(lambda: is_color(page, 2) and page.execute_script("return !film.player.peer"), "WebP again")
    no_errors(page)


@pytest.mark.skipif(not PICTURES.is_dir(), reason="PAGE_PICTURES names no folder for the picture of the README")
def test_film_the_page(page):
    """Ten seconds of the page, as the animation in README and docs/serving.md."""
    until(lambda: is_color(page, 0), "a red film")
    page.set_window_size(1240, 830)
    body = page.find_element(By.TAG_NAME, "body")
    acts = {2: [Keys.ARROW_UP], 4: "7", 6: [Keys.ARROW_RIGHT]}
    shots, begin = [], time.monotonic()
    while (now := time.monotonic() - begin) < 10:
        for at in [at for at in acts if at <= now]:
            body.send_keys(*acts.pop(at))
        if len(shots) > 8 and now > 7.6 and "blue" not in caption(page):
            page.find_element(By.CSS_SELECTOR, "#colors [data-word=blue]").click()
        shots.append((now, Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")))
        time.sleep(max(0.0, 0.1 - (time.monotonic() - begin - now)))
    assert caption(page) == "a blue 7 moving right"
    no_errors(page)
    images = [shot.resize((868, round(868 * shot.height / shot.width)), Image.Resampling.LANCZOS) for _, shot in shots]
    durations = [round(1000 * (b[0] - a[0])) for a, b in zip(shots, shots[1:], strict=False)] + [100]
    collage = Image.fromarray(np.concatenate([np.asarray(image) for image in images[:: len(images) // 8]]))
    images = [image.quantize(palette=collage.quantize(256), dither=Image.Dither.NONE) for image in images]
    images[0].save(
        PICTURES / "serving.gif", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True
    )
