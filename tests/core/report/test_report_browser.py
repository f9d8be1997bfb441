"""The pages in a real browser: nothing is run, nothing is asked of anybody, nothing is wider than the screen."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import browser
import reports
from nerve_core.report import write_comparison, write_report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt install chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Every kind of page, by its name; the folders hold nothing else than the page."""
    root = tmp_path_factory.mktemp("pages")

    def alone(path, name):
        folder = root / "alone" / name
        folder.mkdir(parents=True)
        return Path(shutil.copy(path, folder))

    made = {
        "evaluation": reports.evaluation(root / "evaluation", 21, 2),
        "many names": reports.evaluation(root / "many names", 171, 4),
        "hostile names": reports.evaluation(
            root / "hostile names", 14, 2, hostile=True, title=reports.HOSTILE[4], notes=reports.HOSTILE
        ),
        "replay": reports.replay(root / "replay", 2000, reports.HOSTILE),
        "replay of nothing": reports.replay(root / "replay of nothing", 0),
        "tune": reports.tune(),
    }
    found = {name: write_report(report, root / name) for name, report in made.items()}
    write_report(
        dataclasses.replace(made["hostile names"], title="B", model=reports.HOSTILE[0], settings={"x": "</style>"}),
        root / "hostile names",
    )
    for name, (a, b) in {
        "comparison of evaluations": ("evaluation", "hostile names"),
        "comparison of replays": ("replay", "replay of nothing"),
    }.items():
        found[name] = write_comparison(root / a, root / b, root / name)
    return {name: alone(path, name) for name, path in found.items()}


NAMES = (
    "evaluation",
    "many names",
    "hostile names",
    "replay",
    "replay of nothing",
    "tune",
    "comparison of evaluations",
    "comparison of replays",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_alone_in_a_folder_is_whole_on_every_screen(tab, pages, name):
    pictures = {}
    for width, dark in ((1280, False), (1280, True), (390, False)):
        tab.open(pages[name], width=width, dark=dark)
        assert tab.requests() == [pages[name].resolve().as_uri()]
        assert tab.complaints() == []
        assert not any(event["method"] == "Page.javascriptDialogOpening" for event in tab.events if "method" in event)
        assert tab.run("[...document.images].filter((image) => !image.naturalWidth).length") == 0
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run("document.scripts.length") == 0
        shown = cv2.imdecode(np.frombuffer(tab.picture(whole=False), np.uint8), cv2.IMREAD_COLOR)
        assert len(np.unique(shown.reshape(-1, 3) @ (1, 256, 65536))) > 40  # colours: it is not blank
        pictures[width, dark] = shown
    assert pictures[1280, False].mean() > 160
    assert pictures[1280, True].mean() < 90


def test_names_are_read_as_they_are(tab, pages):
    tab.open(pages["hostile names"])
    text = tab.run("document.body.innerText")
    for name in reports.HOSTILE[:8]:
        assert name.strip() in text


def test_a_video_beside_the_page_is_the_only_other_file_it_asks_for(tab, tmp_path):
    (tmp_path / "overlay.webm").write_bytes(b"no video at all")
    path = write_report(reports.replay(tmp_path, 20), tmp_path)
    tab.open(path)
    assert set(tab.requests()) <= {path.as_uri(), (tmp_path / "overlay.webm").as_uri()}
    assert tab.complaints() == []
    assert tab.run("document.querySelector('video').currentSrc").endswith("/overlay.webm")


def test_the_browser_sees_what_these_tests_look_for(tab, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("so"); throw new Error("fault")</script>'
    )
    tab.open(page)
    assert "http://127.0.0.1:9/x.png" in tab.requests()
    assert any("fault" in line for line in tab.complaints())
    assert any('"so"' in line for line in tab.complaints())
