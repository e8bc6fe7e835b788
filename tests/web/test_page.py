"""The page, as somebody sees it in a browser."""

import base64
import io
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

from mdm_models import web

STEPS = 25  # that the page takes unless told otherwise


def pixels(image) -> np.ndarray:
    """What an <img> of the page shows."""
    encoded = image.get_attribute("src").partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture.convert("RGB"))


def draw(browser, prompt: str, seed: str = "", style: str = "as written") -> None:
    browser.write("#prompt", prompt)
    browser.write("#seed", seed)
    browser.click(f"#style input[value='{style}'] + span")
    browser.click("#draw")


def finished(browser) -> dict[int, list[np.ndarray]]:
    """Size of a resolution → its pictures, once they are done."""
    browser.until(lambda: browser.find(".shown.done"), "for the pictures")
    return {
        int(level.get_attribute("data-size")): [pixels(image) for image in level.find_elements("tag name", "img")]
        for level in browser.find(".level")
    }


@pytest.fixture
def paced(pictures, monkeypatch):
    """Steps slow enough to be seen."""
    monkeypatch.setattr(type(pictures), "pause", 0.1)


def test_a_prompt_style_and_seed_give_what_the_pipeline_gives_at_every_resolution(browser, address, pictures):
    browser.open(address)
    draw(browser, "red apple", "7", "noto")
    shown = finished(browser)
    expected = pictures(
        "red apple, noto style", num_images_per_prompt=4, num_inference_steps=STEPS, seed=7, return_levels=True,
        output_type="np", progress=False,
    )  # fmt: skip
    assert list(shown) == [16, 8]
    for level, drawn in zip(expected, shown.values(), strict=True):
        np.testing.assert_array_equal(np.stack(drawn), level)


def test_every_resolution_is_shown_while_it_denoises(browser, address, paced):
    browser.open(address)
    draw(browser, "red apple")
    browser.until(lambda: browser.find(".shown.busy"), "for the first step")
    assert [level.get_attribute("data-size") for level in browser.find(".level")] == ["16", "8"]
    assert f"of {STEPS}" in browser.find(".state")[0].text
    early = pixels(browser.find(".level img")[0])
    assert not np.array_equal(finished(browser)[16][0], early)


def test_stop_leaves_the_picture_as_it_is(browser, address, paced):
    browser.open(address)
    draw(browser, "red apple")
    browser.until(lambda: browser.find(".shown.busy"), "for the first step")
    browser.click("#stop")
    draw(browser, "red apple", "1")  # and the next one can be drawn
    finished(browser)


@pytest.mark.parametrize(
    ("prompt", "seed", "said"),
    [("  ", "", "Write what to draw first"), ("red apple", "seven", "seed is “seven”"), ("red apple", "-1", "“-1”")],
)
def test_a_wrong_input_is_answered_by_what_to_mend(browser, address, prompt, seed, said):
    browser.open(address)
    draw(browser, prompt, seed)
    toast = browser.until(lambda: browser.find(".toast-body, .toast-wrap"), "for the error")[0]
    browser.until(lambda: said in toast.text, f"for {said!r}")
    browser.write("#prompt", "red apple")
    browser.write("#seed", "3")
    browser.click("#draw")
    assert finished(browser)


def test_two_users_at_once_each_see_their_own_pictures_grow(browser, address, pictures, monkeypatch):
    monkeypatch.setattr(type(pictures), "pause", 0.5)
    users = {browser.open(address): 1, browser.open(address): 2}
    for user, seed in users.items():
        browser.driver.switch_to.window(user)
        draw(browser, "red apple", str(seed))
    for user in users:
        browser.driver.switch_to.window(user)
        browser.until(lambda: browser.find(".shown:not(.empty)"), "for the first step")
        assert browser.find(".shown.busy"), "the other one waited until these pictures were done"
    monkeypatch.undo()
    for user, seed in users.items():
        browser.driver.switch_to.window(user)
        expected = pictures(
            "red apple", num_images_per_prompt=4, num_inference_steps=STEPS, seed=seed, output_type="np", progress=False
        )
        np.testing.assert_array_equal(np.stack(finished(browser)[16]), expected)


def test_pictures_are_saved_one_by_one_or_all_together(browser, address):
    browser.open(address)
    draw(browser, "red apple", "5")
    finished(browser)
    browser.click(".level a[href]")
    one = browser.downloads / "red-apple-5-0.png"
    browser.until(one.exists, "for the file")
    browser.click("a.all")
    every = browser.downloads / "red-apple-5.zip"
    browser.until(every.exists, "for the archive")
    with zipfile.ZipFile(every) as archive:
        assert len(archive.namelist()) == 2 * 4
        assert archive.read("red-apple-5-0-16.png") == one.read_bytes()


def test_the_page_of_clips_adds_no_style_to_the_prompt_and_tries_things_that_move(browser, clips_address):
    browser.open(clips_address)
    assert not [style for style in browser.find("#style") if style.is_displayed()]
    assert "butterfly" in browser.find("#try")[0].text


def test_clips_move(browser, clips_address):
    browser.open(clips_address)
    browser.write("#prompt", "red apple")
    browser.click("#draw")
    browser.until(lambda: browser.find(".shown.done"), "for the clips")
    assert "16 × 16, 4 frames" in browser.find(".level h3")[0].text
    encoded = browser.find(".level img")[0].get_attribute("src").partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as clip:
        assert clip.n_frames == 4


def test_nothing_is_asked_of_a_network(browser, address):
    browser.requests()
    browser.open(address)
    draw(browser, "red apple")
    finished(browser)
    asked = browser.requests()
    assert any(url.startswith(address) for url in asked)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:", "about:"))] == []


def test_an_address_that_cannot_be_served_is_named_at_once():
    with pytest.raises(ValueError, match="port is 99999; it must be in 1…65535"):
        web.serve(web.gr.Blocks(), "127.0.0.1", 99999, wait=False)
    with pytest.raises(OSError, match=r"nothing can be served at 198.51.100.1, port any: \[Errno"):
        web.serve(web.gr.Blocks(), "198.51.100.1", None, wait=False)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        web.serve(web.gr.Blocks(), "127.0.0.1", taken.getsockname()[1], wait=False)
