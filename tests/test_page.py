"""The page in a real browser: Chromium, driven by Playwright. One server and one browser serve all visits.

By default the first of them are made; WAN_EVERY_PAGE=1 makes all, WAN_PAGE_LOAD=1 the test under load.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Found, not imported: that takes seconds.
pytestmark = [
    pytest.mark.skipif(not find_spec("gradio"), reason='the page is not installed: pip install ".[web]"'),
    pytest.mark.skipif(not find_spec("playwright"), reason="Playwright is not installed"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium"),
]

ROOT = Path(__file__).parents[1]
SECONDS = 400_000  # milliseconds that anything may take: other tests share the cores
EVERY = bool(os.environ.get("WAN_EVERY_PAGE"))


class Site:
    """A server of the page in a process of its own, and a visitor's tab.

    Attributes:
        out: folder of results.
        page: the tab.
        asked: addresses that the browser has asked for.
        wrong: what its console complained about.
    """

    def __init__(self, out, browser):
        self.out, self.url, self.asked, self.wrong = out, None, [], []
        self.start()
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(SECONDS)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)

    def start(self):
        port = self.url.rpartition(":")[2] if self.url else "0"
        command = [sys.executable, "-m", "wan.web", "--port", port, "--out", str(self.out)]
        self.server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http://\S+:\d+", self.server.stdout.readline())[0]

    def stop(self, number=signal.SIGTERM):
        self.server.send_signal(number)
        self.server.wait()

    def open(self, path="/"):
        self.page.goto(self.url + path)
        self.page.locator("#make").wait_for()
        self.part("now").locator(":scope > *").first.wait_for()

    def part(self, name):
        return self.page.locator(f'[data-live="{name}"]')

    def fill(self, name, value):
        box = self.page.locator(f"#{name} :is(input, textarea)").first
        box.fill(str(value))
        box.press("Tab")

    def make(self, **values):
        """Fills in what is given, asks for it, and returns the new job."""
        before = {job["id"] for job in self.jobs()}
        for name, value in values.items():
            self.fill(name, value)
        self.page.locator("#make").click()
        return until(lambda: next((job for job in self.jobs() if job["id"] not in before), None))

    def jobs(self):
        return self.page.request.get(self.url + "/jobs").json()["jobs"]

    def job(self, name):
        return next(job for job in self.jobs() if job["id"] == name)

    def done(self, job):
        """Waits for a job's result."""
        until(lambda: self.job(job["id"])["status"] in ("done", "failed"))
        told = self.job(job["id"])
        assert told["status"] == "done", told["error"]
        return Path(told["result"])

    def denoising(self, job):
        until(lambda: (self.job(job["id"])["progress"] or {}).get("preview_step"))
        self.part("now").locator("img").wait_for()


def until(found, seconds=SECONDS / 1000):
    end = time.monotonic() + seconds
    while not (there := found()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return there


@contextlib.contextmanager
def site(out):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        visited = Site(out, browser)
        try:
            yield visited
        finally:
            visited.stop()
            browser.close()


UNNAMED = """() => {
    const controls = "button, input, textarea, select, a[href], video, img, progress, svg[role=img]";
    const named = (e) => e.labels?.[0]?.innerText.trim() || e.ariaLabel || e.title || e.alt || e.innerText?.trim()
        || e.getAttribute("aria-labelledby");
    return [...document.querySelectorAll(controls)]
        .filter((e) => e.checkVisibility() && !e.closest("[aria-hidden=true]") && !named(e))
        .map((e) => e.outerHTML.slice(0, 200));
}"""


def loads_from_nowhere_else_and_names_its_controls(site):
    site.open()
    assert {address.split("/")[2] for address in site.asked if "://" in address} == {site.url.split("/")[2]}
    assert not site.wrong
    site.page.get_by_text("More settings").click()
    assert site.page.evaluate(UNNAMED) == []
    for label in ("Task", "Prompt", "Size", "Steps", "Seed", "Negative prompt", "Solver", "Memory mode"):
        assert site.page.get_by_label(label, exact=True).first.is_visible(), label
    site.page.get_by_text("More settings").click()


def makes_a_video_that_plays(site):
    """By keyboard alone; and the tab is reloaded in the middle."""
    site.fill("steps", 30)
    site.page.locator("#make").focus()
    site.page.keyboard.press("Enter")
    (job,) = until(site.jobs)
    site.denoising(job)
    assert "denoise" in site.part("now").locator(".stages .on").inner_text()
    site.open()
    assert site.part("now").locator("img").count() or site.job(job["id"])["status"] == "done"
    site.done(job)
    video = site.part("now").locator("video")
    video.wait_for()
    until(lambda: video.evaluate("v => v.readyState >= 2 && v.videoWidth === 80 && v.currentTime > 0.2"))
    assert "RAM" in site.part("memory").inner_text()
    assert site.part("gallery").locator("video").count() == 1


def says_that_a_plan_does_not_fit(site):
    site.fill("limit", "0.1")
    site.page.locator("#plan").get_by_text("Does not fit").wait_for()
    assert re.search(r"needs 0\.\d+ GiB", site.page.locator("#plan").inner_text())
    site.fill("limit", "8 GiB")
    site.page.locator("#plan").get_by_text("Fits", exact=True).wait_for()
    assert "No GPU here: planned for a card of 8 GiB" in site.page.locator("#plan").inner_text()


def fits_a_phone(site):
    site.page.set_viewport_size({"width": 390, "height": 800})
    for _ in range(2):
        widths = site.page.evaluate(
            "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
        )
        assert max(widths) == 390
        site.page.get_by_text("More settings").click()
    site.page.set_viewport_size({"width": 1280, "height": 900})


def cancels_within_a_step(site):
    job, behind = site.make(steps=900), site.make(steps=4)
    site.denoising(job)
    assert "queued" in site.part("queue").inner_text()
    site.part("now").get_by_role("button", name="Cancel").click()
    until(lambda: site.job(job["id"])["status"] == "cancelled", 5)
    site.part("queue").get_by_text("cancelled").wait_for()
    site.done(behind)
    assert not list(site.out.glob(f"{job['id']}*"))
    site.part("queue").get_by_role("button", name="Remove").click()
    site.part("queue").get_by_text("Nothing waits.").wait_for()


def refuses_bad_uploads(site):
    site.page.locator("#task input").click()
    site.page.get_by_role("option", name="Image to video · toy").click()
    bad, upload = site.out.parent / "bad.png", site.page.locator("#image input[type=file]")
    bad.write_text("no picture")
    site.page.locator("#needs").get_by_text("image: missing, i2v-toy needs it").wait_for()
    assert site.page.locator("#make").is_disabled()
    upload.set_input_files(bad)
    site.page.locator("#needs").get_by_text("bad.png: not a readable image").wait_for()
    assert site.page.locator("#make").is_disabled()
    site.page.locator("#image").get_by_label("Clear").click()
    site.page.locator("#image input[type=file]").set_input_files(ROOT / "examples" / "i2v_input.png")
    site.page.get_by_alt_text("what was uploaded").wait_for()
    until(site.page.locator("#make").is_enabled)
    site.fill("prompt", "")
    site.page.locator("#needs").get_by_text("prompt: missing").wait_for()
    assert site.page.locator("#make").is_disabled()
    site.fill("prompt", "a ball")
    until(site.page.locator("#make").is_enabled)
    site.fill("frames", 6)
    site.page.locator("#needs").get_by_text("frame_num 6: give 4n+1").wait_for()
    site.fill("frames", 5)
    path = site.done(site.make(steps=2))
    assert site.job(path.stem)["settings"]["image"].startswith(str(site.out / "uploads"))


def uses_settings_again(site):
    site.open()
    first = site.done(site.make(prompt="a blue square", steps=3, frames=5))
    card = site.part("gallery").locator("article", has_text="a blue square")
    card.get_by_role("link", name="Same seed").click()
    site.page.get_by_text("Settings are taken over.").wait_for()
    assert site.page.locator("#prompt textarea").input_value() == "a blue square"
    again = site.done(site.make())
    assert again != first and again.read_bytes() == first.read_bytes()
    site.page.once("dialog", lambda dialog: dialog.accept())
    site.part("gallery").locator(f'[data-delete="/results/{again.name}"]').click()
    until(lambda: not again.exists())
    assert first.exists()


def goes_on_after_the_server_was_killed(site):
    site.open()
    site.fill("seed", 5)
    whole = site.done(site.make(steps=150, frames=5))
    job = site.make()
    site.denoising(job)
    site.part("now").get_by_role("button", name="Pause").click()
    site.part("queue").get_by_text("paused").wait_for()
    assert list(site.out.glob(f"{job['id']}*.state"))
    running = site.make()
    site.denoising(running)
    site.stop(signal.SIGKILL)
    site.page.get_by_text("The server does not answer").wait_for()
    site.start()
    site.page.get_by_text("The server does not answer").wait_for(state="hidden")
    site.part("queue").get_by_role("button", name="Resume").click()
    for made in (running, job):
        assert site.done(made).read_bytes() == whole.read_bytes()
    assert not list(site.out.glob("*.state"))


SHORT = (
    loads_from_nowhere_else_and_names_its_controls,
    makes_a_video_that_plays,
    says_that_a_plan_does_not_fit,
    fits_a_phone,
)
LONG = (
    cancels_within_a_step,
    refuses_bad_uploads,
    uses_settings_again,
    goes_on_after_the_server_was_killed,
)


def test_the_page(tmp_path):
    with site(tmp_path / "out") as visited:
        for visit in SHORT + LONG if EVERY else SHORT:
            begun = time.monotonic()
            visit(visited)
            print(f"{visit.__name__}: {time.monotonic() - begun:.1f} s")
        for address in visited.asked:
            assert "://" not in address or address.startswith((visited.url, "blob:"))


JOBS, TABS = 50, 20


@pytest.mark.skipif(not os.environ.get("WAN_PAGE_LOAD"), reason="the test under load: WAN_PAGE_LOAD=1")
def test_under_load(tmp_path):
    """Many jobs and many tabs: nothing is lost, and the page answers in under a second."""
    with site(tmp_path / "out") as visited:
        context = visited.page.context
        tabs = [context.new_page() for _ in range(TABS)]
        for tab in tabs:
            tab.set_default_timeout(SECONDS)
            tab.goto(visited.url, wait_until="commit")
        for tab in tabs:
            tab.locator("#make").wait_for()
        asked = {"task": "t2v-tiny", "prompt": "a ball", "frame_num": 1, "sample_steps": 2}
        answers = [
            context.request.post(f"{visited.url}/jobs", data=asked | {"base_seed": number})
            for number in range(JOBS)
        ]
        assert all(answer.status == 201 for answer in answers)
        names = [answer.json()["id"] for answer in answers]
        took = {"/": [], "/live": [], "/jobs": []}
        while any(job["status"] in ("queued", "running") for job in visited.jobs()):
            for path, seconds in took.items():
                begun = time.monotonic()
                assert context.request.get(visited.url + path).ok
                seconds.append(time.monotonic() - begun)
            time.sleep(0.5)
        assert [job["id"] for job in visited.jobs()] == names[::-1]
        assert all(job["status"] == "done" and Path(job["result"]).is_file() for job in visited.jobs())
        for tab in tabs:
            tab.locator('[data-live="queue"]').get_by_text("Nothing waits.").wait_for()
        for path, seconds in took.items():
            seconds.sort()
            middle, worst = seconds[len(seconds) // 2], seconds[-1]
            print(f"{path}: {len(seconds)} times, median {middle:.3f} s, at most {worst:.3f} s")
            assert worst < 1


PROMPTS = (
    "a red ball rolls to the right on a white ground",
    "a blue square grows on a white ground",
    "a yellow triangle bounces on a grey ground",
    "a green ball falls on a black ground",
)


@pytest.mark.skipif(
    not os.environ.get("WAN_PAGE_SHOTS"), reason="takes pictures for docs: WAN_PAGE_SHOTS=docs"
)
def test_pictures_for_the_document(tmp_path):
    """The page idle, in the middle of a run and done, as PNG files of few colours."""
    from PIL import Image

    def take(visited, name):
        picture = tmp_path / name
        visited.page.mouse.move(0, 0)
        visited.page.screenshot(path=picture, full_page=True)
        quantized = Image.open(picture).convert("RGB").quantize(160, dither=Image.Dither.NONE)
        quantized.save(Path(os.environ["WAN_PAGE_SHOTS"]) / name, optimize=True)

    with site(tmp_path / "out") as visited:
        visited.open()
        visited.page.locator("#plan").get_by_text("Fits", exact=True).wait_for()
        visited.page.get_by_text("No GPU here", exact=True).wait_for()
        take(visited, "page-idle.png")
        for prompt in PROMPTS[2:]:
            visited.make(prompt=prompt)
        for job in visited.jobs():
            visited.done(job)
        job = visited.make(prompt=PROMPTS[0], steps=40)
        for prompt in PROMPTS[1:3]:
            visited.make(prompt=prompt, steps=20)
        visited.part("queue").get_by_role("button", name="Pause").last.click()
        until(lambda: (visited.job(job["id"])["progress"]["preview_step"] or 0) >= 24)
        visited.page.wait_for_timeout(1500)
        take(visited, "page-running.png")
        for waiting in visited.jobs():
            if waiting["status"] in ("queued", "paused"):
                visited.page.request.post(f"{visited.url}/jobs/{waiting['id']}/cancel")
                visited.page.request.delete(f"{visited.url}/jobs/{waiting['id']}")
        visited.done(job)
        video = visited.part("now").locator("video")
        video.scroll_into_view_if_needed()  # out of sight it does not play
        until(lambda: video.evaluate("v => v.currentTime > 0.3"))
        visited.page.wait_for_timeout(1500)
        take(visited, "page-done.png")
