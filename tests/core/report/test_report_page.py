"""The page says what was measured, what was not and what was published; names are shown and never run."""

import base64
import dataclasses
import html
import re
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reports
from nerve_core.images.visualize import palette
from nerve_core.report import Picture, ReportError, charts, page, read_report, save_picture, write_report


def text_of(path) -> str:
    """What a reader sees of a page, without tags, in one line."""
    body = path.read_text().split("<body>")[1]
    return " ".join(
        html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", " ", body, flags=re.DOTALL))).split()
    )


def test_ours_and_the_published_figures_stand_apart(tmp_path):
    report = reports.evaluation(tmp_path, 5, 1)
    text = text_of(write_report(report, tmp_path))
    score = report.sets[0].scores[0]
    ours, published = text.split("Published by their authors, as printed; not measured here")
    low, high = score.interval
    assert f"{100 * score.miou:.1f} {100 * low:.1f} to {100 * high:.1f}" in ours
    assert "NERVE published: arXiv 2511.08248, Table 1 69.7" in published
    assert "69.7" not in ours
    assert "untuned on real data" in text


def test_a_part_of_a_set_says_so_loudly_and_the_whole_does_not(tmp_path):
    part = text_of(write_report(reports.evaluation(tmp_path, 5, 1, images=20), tmp_path))
    assert "Not the whole set: of 1 449 images" in part
    assert "only 20 were scored" in part
    assert "Not the whole set" not in text_of(write_report(reports.evaluation(tmp_path, 5, 1), tmp_path))


def test_the_embedded_pair_beside_published_figures_is_told_apart(tmp_path):
    said = "no result of the same kind"
    embedded = reports.evaluation(tmp_path, 5, 1, model="embedded on cpu")
    assert said in text_of(write_report(embedded, tmp_path))
    assert said not in text_of(write_report(dataclasses.replace(embedded, model="sd21 on cuda"), tmp_path))
    unpublished = dataclasses.replace(embedded.sets[0], published=())
    assert said not in text_of(write_report(dataclasses.replace(embedded, sets=(unpublished,)), tmp_path))


def test_what_is_not_known_is_a_dash_and_never_a_number(tmp_path):
    report = reports.evaluation(tmp_path, 5, 1)
    score = dataclasses.replace(
        report.sets[0].scores[0], miou=None, interval=None, pixel_accuracy=None, seconds=0.0, images=0, per_class={}
    )
    bare = dataclasses.replace(report.sets[0], scores=(score,), images=0)
    text = text_of(write_report(dataclasses.replace(report, sets=(bare,)), tmp_path))
    assert "– no pixel counted not known – 0 –" in text
    assert "None" not in text
    assert "nan" not in text.split()


def test_settings_that_are_not_the_pairs_come_first(tmp_path):
    text = text_of(write_report(reports.evaluation(tmp_path, 5, 1), tmp_path))
    assert "Settings that are not the pair's own setting in this run the pair's alpha 0.9 0.8 All settings" in text


def test_nothing_a_user_names_becomes_markup(tmp_path):
    report = reports.evaluation(tmp_path, 14, 2, hostile=True, title=reports.HOSTILE[0], notes=reports.HOSTILE)
    path = write_report(report, tmp_path)
    source = path.read_text()
    assert "<script" not in source
    assert "onerror=alert" not in re.sub(r"&lt;img.*?&gt;", "", source)
    assert "{{ 7 * 7 }}" in source
    for name in ('<script>alert("1")</script>', "كرسي أحمر", "椅子と机のある部屋", "$\\frac{1}{0}$"):
        assert name in text_of(path)


@pytest.mark.parametrize("frames", [0, 1, 2, 3000])
def test_a_recording_of_any_length_has_a_page(tmp_path, frames):
    report = reports.replay(tmp_path, frames)
    text = text_of(write_report(report, tmp_path))
    assert "a pixel changes its label, per second" in text
    assert ("No frame was segmented." in text) == (frames == 0)
    assert "The video overlay.webm was not there when this page was written." in text
    assert "a JPEG that cannot be decoded" in text or not frames
    assert "frame 7 (0.010 % of pixels)" in text
    assert "288 of 290" in text


def test_a_video_that_is_there_is_played_and_linked(tmp_path):
    (tmp_path / "overlay.webm").write_bytes(b"x")
    source = write_report(reports.replay(tmp_path, 20), tmp_path).read_text()
    assert '<video controls preload="metadata" src="overlay.webm">' in source
    assert '<a href="overlay.webm">' in source


def test_a_search_shows_its_trials_and_its_gain(tmp_path):
    text = text_of(write_report(reports.tune(), tmp_path))
    assert "trial alpha kernel tuned on, mIoU 0 0.6 exp 0.5" in text
    assert "verdict not distinguishable" in text
    assert "Seed 7" in text


def test_a_run_of_nothing_says_so(tmp_path):
    empty = dataclasses.replace(reports.tune(), kind="evaluation", sets=(), extra={}, command="", title="")
    assert "Nothing was scored: this run has no set." in text_of(write_report(empty, tmp_path))


def test_a_page_is_the_same_each_time(tmp_path):
    report = reports.replay(tmp_path, 400)
    first = write_report(report, tmp_path).read_bytes()
    assert write_report(read_report(tmp_path), tmp_path).read_bytes() == first


def test_a_users_matplotlib_style_is_neither_used_nor_changed(tmp_path):
    import matplotlib

    report = reports.evaluation(tmp_path, 4, 1)
    plain = write_report(report, tmp_path).read_bytes()
    with matplotlib.rc_context({"svg.fonttype": "path", "axes.linewidth": 9, "xtick.major.size": 20}):
        assert write_report(report, tmp_path).read_bytes() == plain
        assert matplotlib.rcParams["axes.linewidth"] == 9


def test_many_names_and_variants_stay_small(tmp_path):
    path = write_report(reports.evaluation(tmp_path, 171, 4), tmp_path)
    assert path.stat().st_size < 3_000_000
    assert "class 170 of a set" in path.read_text()


def test_pictures_beyond_the_bound_are_links_and_each_variants_first_is_in_the_page(tmp_path, monkeypatch):
    report = reports.evaluation(tmp_path, 6, 2)
    files = [tmp_path / name for item in report.sets[0].pictures for name in (item.image, item.truth, item.overlay)]
    monkeypatch.setattr(page, "EMBEDDED_BYTES", sum(file.stat().st_size for file in set(files)) * 2 // 3)
    source = write_report(report, tmp_path).read_text()
    embedded = [len(part) * 3 // 4 - 2 for part in re.findall(r"data:image/jpeg;base64,([^\"]*)", source)]
    assert 0 < sum(embedded) <= page.EMBEDDED_BYTES
    shown = [name for group in page.in_fair_order(report.sets[0].pictures) for name in page.files_of(group)]
    assert source.count("(a file beside this page)") == len(shown) - len(embedded) > 0
    for name in re.findall(r'href="(pictures/[^"]*)"', source):
        assert (tmp_path / name).is_file()
    media = page.Media(tmp_path, [page.files_of(group) for group in page.in_fair_order(report.sets[0].pictures)])
    firsts = [item for item in report.sets[0].pictures if item.image_id in ("2008_000000", "2008_000002")]
    assert len(firsts) == 4
    assert all(media.uri(item.overlay) for item in firsts)


def test_an_image_shown_in_two_sets_counts_twice(tmp_path):
    for name, size in (("shared", 3), ("rare", 4)):
        (tmp_path / name).write_bytes(bytes(size * page.EMBEDDED_BYTES // 8))
    assert page.Media(tmp_path, [["shared"], ["rare"]]).embedded == {"shared", "rare"}
    assert page.Media(tmp_path, [["shared"], ["rare"], ["shared"]]).embedded == {"shared"}


def test_an_image_is_shown_once_with_every_variant_that_picked_it(tmp_path):
    def picked(image_id, variant, rank):
        return Picture(image_id, variant, rank, 0.5, f"{image_id}.jpg", f"{image_id} {variant}.jpg")

    pictures = [
        picked("3", "a", "best"),
        picked("2", "a", "worst"),
        picked("1", "a", "best"),
        picked("1", "b", "worst"),
    ]
    groups = page.worst_first(pictures)
    assert [[(item.image_id, item.variant) for item in group] for group in groups] == [
        [("2", "a")],
        [("1", "a"), ("1", "b")],
        [("3", "a")],
    ]
    assert page.files_of(groups[1]) == ["1.jpg", "1 a.jpg", "1 b.jpg"]


def test_a_picture_that_is_gone_is_said(tmp_path):
    report = reports.evaluation(tmp_path, 4, 1)
    (tmp_path / report.sets[0].pictures[0].overlay).unlink()
    text = text_of(write_report(report, tmp_path))
    assert f"the file {report.sets[0].pictures[0].overlay} was not there" in text


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "pictures/../../secret.jpg"])
def test_a_picture_outside_the_folder_is_refused(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = tmp_path / "report"
    report = reports.evaluation(folder, 4, 1)
    picture = Picture("1", "nerve", "best", None, name, name)
    report = dataclasses.replace(report, sets=(dataclasses.replace(report.sets[0], pictures=(picture,)),))
    with pytest.raises(ReportError, match="outside the report's folder"):
        write_report(report, folder)


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_remedy_and_the_results_are_kept(tmp_path, monkeypatch, library):
    page.environment.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RuntimeError, match=r'pip install "nerve_ros\[eval\]"'):
        write_report(reports.tune(), tmp_path)
    assert read_report(tmp_path) == reports.tune()
    assert (tmp_path / "scores.csv").is_file()


# Charts


def strip_of(times, presence):
    """A strip's alpha, uint8 [columns]."""
    camera = reports.camera_of(times, presence)
    data = np.frombuffer(base64.b64decode(charts.strip(camera, camera.names[0], "#ff8000").split(",")[1]), np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    assert picture[0, 0, :3].tolist() == [0, 128, 255]
    return picture[0, :, 3]


def test_one_frame_among_thousands_is_seen_in_the_strip():
    presence = np.zeros(5000)
    presence[3333] = 1
    alpha = strip_of(np.arange(5000) / 30, presence)
    assert len(alpha) == charts.COLUMNS
    assert np.flatnonzero(alpha).tolist() == [3333 * charts.COLUMNS // 4999]
    assert alpha.max() == 255


def test_a_pause_is_a_gap_and_uneven_frames_are_not():
    times = np.concatenate([np.arange(100) / 10, 60 + np.arange(100) / 10])
    alpha = strip_of(times, np.ones(200))
    assert (alpha[:28] == 255).all()
    assert (alpha[40:160] == 0).all()
    camera = reports.camera_of(times, np.ones(200))
    ((start, end),) = charts.gaps(camera)
    assert start == pytest.approx(9.9 / 69.9)
    assert end == pytest.approx(60 / 69.9)
    jittered = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.15, 300))
    assert charts.gaps(reports.camera_of(jittered, np.ones(300))) == ()


@pytest.mark.parametrize(
    ("seconds", "span", "said"),
    [(0.01, 0, "0 s"), (7.5, 10, "7.5 s"), (7.5, 100, "0:08"), (65, 0, "1:05"), (3723, 0, "1:02:03")],
)
def test_times_are_said_as_a_reader_does(seconds, span, said):
    assert charts.clock(seconds, span) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0, "0"),
        (12345, "12 345"),
        (1.5, "1.5"),
        (5.78e-05, "0.0000578"),
        (1999.6, "2 000"),
        (0.30000001, "0.3"),
    ],
)
def test_numbers_are_said_without_exponents(value, said):
    assert page.number(value) == said


def test_an_interval_that_does_not_hold_its_figure_is_drawn_all_the_same():
    line = dataclasses.replace(reports.evaluation_curves()[0], interval=((0.7, 0.8),) * 5)
    assert charts.curves([line]).startswith("<svg")


# Figures


def test_the_matrix_and_the_list_give_the_shares_of_a_names_pixels():
    score = dataclasses.replace(
        reports.score("", ("a", "b"), 1), confusion=((0, 0, 30), (0, 1, 10), (1, 1, 5), (1, 0, 15))
    )
    numbers, shares = page.matrix(score)
    assert numbers == [0, 1]
    assert shares == {0: {0: 0.75, 1: 0.25}, 1: {1: 0.25, 0: 0.75}}
    assert page.confusions(score) == [(1, 0, 15, 0.75), (0, 1, 10, 0.25)]


def test_names_are_in_the_order_of_the_first_variant_and_what_is_not_there_is_last():
    a = dataclasses.replace(reports.score("a", ("x",), 1), per_class={"x": 0.1, "y": None, "z": 0.7})
    b = dataclasses.replace(reports.score("b", ("x",), 1), per_class={"x": 0.9, "y": None, "w": 0.3})
    assert page.class_rows([a, b], ("background", "x", "y")) == [
        (-1, "z", [0.7, None]),
        (1, "x", [0.1, 0.9]),
        (2, "y", [None, None]),
        (-1, "w", [None, 0.3]),
    ]


def test_a_variant_is_told_by_the_settings_that_are_its_own():
    a = reports.score("a", ("x",), 1, refine="nerve", alpha=0.8, beta=0.5, steps=16)
    b = reports.score("b", ("x",), 1, refine="nerve", alpha=0.9, beta=0.5, steps=16)
    settings = {"alpha": 0.8, "beta": 0.5, "steps": 12}
    assert page.distinguishing(a, [a, b], settings) == {"refine": "nerve", "alpha": 0.8, "steps": 16}


def test_many_names_have_a_list_and_no_matrix():
    labels = tuple(map(str, range(60)))
    score = reports.score("", labels, 1)
    assert page.matrix(score) is None
    assert len(page.confusions(score)) == page.CONFUSIONS


# Pictures


@settings(max_examples=20)
@given(image_id=st.text(max_size=300), variant=st.text(max_size=20))
def test_any_id_makes_files_inside_the_folder(image_id, variant, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    image, truth = reports.scene(0, 4, (12, 16))
    picture = save_picture(folder, image, truth, ("a", "b", "c"), image_id=image_id, variant=variant, rank="worst")
    assert (picture.image_id, picture.variant, picture.rank, picture.truth) == (image_id, variant, "worst", "")
    for name in (picture.image, picture.overlay):
        assert re.fullmatch(r"pictures/[A-Za-z0-9_]{1,40}-[0-9a-f]{12}\.jpg", name)
        assert (folder / name).is_file()


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    for size, wanted in (((600, 1200), (240, 480)), ((50, 97), (50, 97)), ((1, 2000), (1, 480))):
        image, truth = np.full((*size, 3), 90, np.uint8), np.ones(size, np.uint8)
        picture = save_picture(tmp_path, image, truth, ("a",), image_id="x", variant="v", rank="best", truth=truth)
        for name in (picture.image, picture.overlay, picture.truth):
            assert cv2.imread(str(tmp_path / name)).shape[:2] == wanted


def test_overlays_have_the_labels_colours_and_what_is_ignored_is_hatched(tmp_path):
    image = np.full((60, 80, 3), 128, np.uint8)
    truth = np.zeros((60, 80), np.uint8)
    truth[:, 40:], truth[:20, :30] = 2, 255
    picture = save_picture(tmp_path, image, truth, ("a", "b"), image_id="x", variant="v", rank="best")
    assert picture.labels == (2, 255)
    drawn = cv2.imread(str(tmp_path / picture.overlay))[:, :, ::-1].astype(int)
    assert np.abs(drawn[30, 60] - (palette()[2].astype(int) + 128) / 2).max() <= 12  # JPEG
    assert drawn[2:18, 2:28].std() > 20  # slanted lines
    assert np.abs(drawn[40, 10] - 128).max() <= 6


def test_two_images_of_one_id_keep_their_own_files_and_one_image_is_stored_once(tmp_path):
    image, truth = reports.scene(0, 4)
    other, _ = reports.scene(1, 4)
    words = {"image_id": "1", "variant": "v", "rank": "best"}
    first, second, third = (save_picture(tmp_path, of, truth, "abc", **words) for of in (image, other, image))
    assert first.image != second.image
    assert first == third


def test_labels_of_another_size_are_refused(tmp_path):
    image, truth = reports.scene(0, 4)
    with pytest.raises(ValueError, match="image x is 160 x 120, its labels are 160 x 119"):
        save_picture(tmp_path, image, truth[1:], "abc", image_id="x", variant="v", rank="best")
