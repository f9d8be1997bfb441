"""A user's text is printed as text by every command: no markup, no emoji codes, nothing that a terminal obeys."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import cv2
import pytest
import typer.main
from rich.table import Table
from rich.text import Text

from nerve_core.cli.app import app
from nerve_core.console import PlainConsole, console, printable
from nerve_core.embedded.scenes import draw_scene
from results_schema import printed

ROOT = Path(__file__).parents[3]
NAME = "[/mug] [red]x[/] :smile:"
FILE = f"{NAME}\x1b[31m\u202e\x9b2J\a"
FILE = FILE.replace("/", "|")
SHOWN = r"[|mug] [red]x[|] :smile:\x1b[31m\u202e\x9b2J\x07"
UNSAFE = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), 0x2066, 0x2069)}

COMMANDS = {
    "segment": ("segment", "{folder}", "--names", NAME, "--out", "{out}"),
    "segment, no image": ("segment", "{missing}", "--names", NAME, "--out", "{out}"),
    "segment, no pair": ("segment", "{folder}", "--names", "a", "--model", "{missing}", "--out", "{out}"),
    "tune": ("tune", "{set}", "--trials", 2, "--axes", "alpha", "--out", "{out}"),
    "tune, no set": ("tune", "{missing}", "--out", "{out}"),
    "eval scenes": ("eval", "scenes", "--count", 1, "--refine", FILE),
    "eval folder": ("eval", "folder", "--root", "{set}", "--refine", "none", "--out", "{out}"),
    **{
        f"eval {name}": ("eval", name, "--root", "{missing}")
        for name in ("voc21", "voc20", "pc60", "pc59", "coco-object", "coco-stuff", "ade20k")
    },
    **{f"eval {name}": ("eval", name, "--roots", "{missing}") for name in ("table1", "table3", "table4", "fig2")},
    "models list": ("models", "list", "--cache-dir", "{missing}"),
    "models pull": ("models", "pull", "{missing}"),
    "models pull of folders": ("models", "pull", "{pair}"),
    "models verify": ("models", "verify", "{pair}"),
    "models verify, none": ("models", "verify", "{missing}"),
    "models path": ("models", "path", "{pair}", "--cache-dir", "{missing}"),
    "models clear-cache": ("models", "clear-cache"),
    "bench walk": ("bench", "walk", "--device", FILE),
    "bench frame": ("bench", "frame", "--model", "{missing}", "--device", "cpu", "--frames", 1),
    "report show": ("report", "show", "{missing}"),
    "report compare": ("report", "compare", "{missing}", "{missing}"),
}
SILENT = {"models list", "models clear-cache"}
"""Commands that print nothing of a user's."""


@pytest.fixture
def places(tmp_path, whole_pair) -> dict[str, Path]:
    """A folder with an image, one with labels of such names, a pair, and a path to nothing, all of such names."""
    from generated_sets import write_folder
    from nerve_core.embedded.scenes import NAMES, draw_scenes

    folder = tmp_path / FILE
    folder.mkdir()
    encoded = cv2.imencode(".png", draw_scene(5, size=(48, 64)).image[:, :, ::-1])[1]
    (folder / f"{FILE}.png").write_bytes(encoded.tobytes())
    (folder / f"{FILE}2.png").write_bytes(b"no picture")
    labelled = write_folder(folder / "set", draw_scenes(7, 4, size=(48, 64)))
    classes = labelled / "classes.txt"
    classes.write_text(classes.read_text().replace(NAMES[0], NAME))
    pair = folder / "pair"
    pair.symlink_to(whole_pair)
    only = folder / "only"
    only.mkdir()
    for path in list(folder.glob("*.png")):
        path.rename(only / path.name)
    missing = folder / f"missing {FILE}"
    return {"folder": only, "set": labelled, "pair": pair, "missing": missing, "out": folder / "out"}


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_prints_text_as_it_is(nerve, places, monkeypatch, case):
    monkeypatch.setenv("COLUMNS", "2000")
    arguments = [str(part).format(**places) if "{" in str(part) else part for part in COMMANDS[case]]
    code, out, err = nerve(*arguments)
    said = out + err
    assert "Traceback" not in said
    assert code in (0, 1, 2)
    assert not UNSAFE & set(said), f"{case}: control characters reach the terminal"
    assert case in SILENT or SHOWN in said or "[/mug] [red]x[/] :smile:" in said, said


def test_every_command_is_tried():
    """A command that is added has to be added to COMMANDS too."""

    def names(command, before: str = "") -> list[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [before.strip()]
        return [name for key, item in inner.items() for name in names(item, f"{before} {key}")]

    commands = [name for name in names(typer.main.get_command(app)) if name.split()[0] not in ROS]
    assert set(commands) == {case.split(",")[0].split(" of ")[0] for case in COMMANDS}


ROS = ("watch", "locate", "replay")
"""Commands that nerve_ros adds where it was imported; tests/ros and tests/core/replay try them."""


def test_names_and_files_of_segment_are_whole_in_the_table_and_in_json(nerve, places, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    arguments = ("segment", places["folder"], "--names", NAME, "--out", places["out"])
    code, out, err = nerve(*arguments, "--json")
    assert code == 2, "one is no picture"
    found = printed(out)
    assert found["images"][0]["classes"][0]["name"] == NAME
    assert found["images"][0]["image"].endswith(f"{FILE}.png")
    code, out, err = nerve(*arguments)
    assert NAME in err
    assert f"{SHOWN}.png  (" in err


def test_a_replay_prints_text_as_it_is(nerve, places, whole_pair, tmp_path, monkeypatch, capsys):
    import bags
    from nerve_core.replay.console import progress, show
    from nerve_core.replay.frames import Selection
    from nerve_core.replay.run import replay
    from nerve_core.segmenter import Segmenter
    from nerve_core.text.vocabulary import Vocabulary

    bag = bags.write(places["folder"] / "film", bags.film(2))
    segmenter = Segmenter.from_pretrained(str(whole_pair), device="cpu")
    monkeypatch.setenv("COLUMNS", "2000")
    with progress(console, 2) as advance:
        replayed = replay(
            bag, Selection((bags.TOPIC,)), segmenter, Vocabulary([NAME]), places["out"], seen=lambda *_: advance()
        )
    show(console, replayed, places["out"])
    said = capsys.readouterr().err
    assert NAME in said
    assert f"{SHOWN}/out/report.html" in said
    assert not UNSAFE & set(said)


def test_a_page_shows_text_as_text(nerve, places):
    code, _, err = nerve("eval", "folder", "--root", places["set"], "--refine", "none", "--out", places["out"])
    assert code == 0, err
    page = (places["out"] / "report.html").read_text()
    assert NAME in page


# The console


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_takes_every_text_as_text(monkeypatch, terminal):
    file = io.StringIO()
    plain = PlainConsole()
    plain.file, plain._force_terminal, plain.no_color = file, terminal, True
    plain._width = 300
    table = Table("name", title=FILE)
    table.add_row(FILE)
    table.add_row(Text(FILE))
    plain.print(FILE, table, Text(FILE), soft_wrap=True)
    with plain.status(FILE) as status:
        status.update(FILE + FILE)
    said = file.getvalue()
    assert said.count(SHOWN.removesuffix(r"\x07")) >= 5, "rich drops BEL from its Text"
    assert "\x1b[31m" not in said
    assert not UNSAFE - {"\x1b", "\r"} & set(said)
    assert "😄" not in said
    rows = [line for line in said.splitlines() if line.startswith("│")]
    assert len({len(row) for row in rows}) == 1, "a table is measured by what is printed"


def test_printable_keeps_what_people_write():
    for text in ("Straße 漢字\u3000👩\u200d🚀 می\u200cخواهم", "a b\tc\nd", ""):
        assert printable(text) == text
    assert printable("a\x1b\u202eb\udcffc\x85d\u2028e") == r"a\x1b\u202eb\udcffc\x85d\u2028e"


# No new place


def sources() -> list[Path]:
    return [
        path for folder in ("nerve_core", "nerve_ros", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")
    ]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_prints_text_as_markup(path):
    """One console takes text as text; no other is made, and no column of a progress bar has markup."""
    for call in calls(path):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        place = f"{path.relative_to(ROOT)}:{call.lineno}"
        given = {word.arg: word.value for word in call.keywords}
        if name == "Console":
            pytest.fail(f"{place}: use nerve_core.console.PlainConsole")
        if name == "TextColumn":
            off = given.get("markup")
            assert isinstance(off, ast.Constant), f"{place}: give markup=False"
            assert off.value is False, f"{place}: give markup=False"
        if name in ("from_markup", "rprint", "secho", "echo"):
            pytest.fail(f"{place}: use nerve_core.console.say or tell")
        if name == "RichHandler":
            assert "highlighter" in given, place
            assert "markup" not in given, place


@pytest.mark.parametrize(
    "path", [path for path in sources() if path.relative_to(ROOT).parts[0] in ("nerve_core", "nerve_ros")], ids=str
)
def test_what_is_printed_to_standard_output_is_json_or_printable(path):
    for call in calls(path):
        if getattr(call.func, "id", "") == "print" and path.name != "console.py":
            inner = call.args[0] if call.args else None
            function = getattr(inner, "func", None)
            name = getattr(function, "attr", getattr(function, "id", ""))
            assert name in ("dumps", "printable"), (
                f"{path.relative_to(ROOT)}:{call.lineno}: use nerve_core.console.tell"
            )


def test_a_console_of_no_width_prints_all_the_same(monkeypatch, capsys):
    """As terminals of some containers have it."""
    monkeypatch.setenv("COLUMNS", "0")
    table = Table("name")
    table.add_row("ball")
    PlainConsole().print(table)
    assert "ball" in capsys.readouterr().out
