"""Names as people and programs write them, in one text or a file -> entries of a vocabulary."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

MAX_ENTRIES = 4096
"""Entries of a text and words of a vocabulary as they are given, duplicates included: of more than these none is looked
at."""
MAX_TEXT = 128 * MAX_ENTRIES
"""Characters of a text, and bytes of a file, at most."""
_SEPARATORS = ",;\n，；、،؛"
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
_QUOTED = re.compile(
    rf"""\s*(?:"(?P<a>[^"]*)"|'(?P<b>(?:[^']|'')*)'|“(?P<c>[^”]*)”|‘(?P<d>[^’]*)’)\s*(?:[{_SEPARATORS}]|$)"""
)
_BARE = re.compile(rf"([^{_SEPARATORS}]*)(?:[{_SEPARATORS}]|$)")
_BULLET = re.compile(r"\s*[-*•]\s+")
_KEY = re.compile(r"(data|names|vocabulary|background|labels)\s*:", re.IGNORECASE)
_FILE = re.compile(r"[^,;\n]*\.(txt|json|ya?ml|csv|names)", re.IGNORECASE)
_WRITE = 'write names with commas between, as in "ball, mug|cup", or a list as in ["ball", "mug|cup"]'


class VocabularyError(ValueError):
    """A set of names that cannot be used; the message says which rule it breaks and what is accepted."""


def split_names(text: str) -> list[str]:
    """The entries of a text: names separated by commas, semicolons or line breaks, each with its synonyms; "" has none.

    Also a list as JSON, YAML, Python and ROS write it (["ball", 'mug'], [ball, mug], a line "- ball" for each name);
    an entry may stand in quotes, in which a separator is text. Empty entries do not count. Nothing is opened or
    evaluated. Raises VocabularyError for what is none of these, so that a bracket or a quote never becomes a name.
    """
    if len(text) > MAX_TEXT or sum(map(text.count, _SEPARATORS)) > MAX_ENTRIES:
        raise VocabularyError(
            f"the text has too many names: at most {MAX_ENTRIES} commas and line breaks, and {MAX_TEXT} characters"
        )
    text = text.strip()
    if len(text) > 1 and text[0] == "{" and text[-1] == "}":
        raise VocabularyError(f"the text {_short(text)} is a mapping, not a list of names; {_WRITE}")
    if _FILE.fullmatch(text):
        raise VocabularyError(
            f"{_short(text)} reads like the name of a file, and no file is opened here; send its names: {_WRITE}"
        )
    found = _json(text) if text[:1] == "[" else None
    if found is None and (inside := _inside_brackets(text)) is not None:
        found = _split(inside)
    if found is not None:
        return [name for name in found if name.strip()]
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and all(map(_BULLET.match, lines)):
        text = "\n".join(_BULLET.sub("", line, count=1) for line in lines)
    whole = _QUOTED.fullmatch(text)
    if whole:  # the quotes are around all the names, left over from a shell or a launch file
        return split_names(_unquoted(whole))
    return [name for name in _split(text) if name.strip()]


def read_names(text: str) -> list[str]:
    """As `split_names`, for what is typed on a command line: also a file of names.

    A file is meant by "@PATH", or by a path with an ending or a folder that is there. It holds what `split_names`
    reads, in UTF-8, or UTF-16 with its mark; lines that start with # do not count.
    Raises VocabularyError, and OSError for a file that cannot be read.
    """
    typed = text.strip()
    path = Path(typed.removeprefix("@")).expanduser()
    if typed.startswith("@") or (len(typed) < 1024 and _is_file(path) and (path.suffix or len(path.parts) > 1)):
        return _file_names(path)
    if _FILE.fullmatch(typed):
        raise VocabularyError(f"{_short(typed)} reads like a file of names, and there is no such file; {_WRITE}")
    return split_names(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than paths may be, or with a zero byte
        return False


def _file_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise VocabularyError(f"{path} is no file of names: it has more than {MAX_TEXT} bytes")
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = content.decode("utf-16" if utf16 else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path} is no file of names: it must be text in UTF-8 ({error})") from None
    try:
        return split_names("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None


def _inside_brackets(text: str) -> str | None:
    """What stands between the brackets of a list that is the whole text; None for any other text.

    "[red] ball, [blue]" begins and ends with a bracket and is no list: its first one closes before the end.
    """
    if len(text) < 2 or text[0] != "[" or text[-1] != "]":
        return None
    inside = text[1:-1]
    return inside if "]" not in re.sub(r"\"[^\"]*\"|'[^']*'|\[[^\[\]]*\]", "", inside) else None


def _json(text: str) -> list[str] | None:
    """The entries of a JSON list; None for what is no JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    wrong = [item for item in found if isinstance(item, list | dict)]
    if wrong:
        raise VocabularyError(f"{_short(str(wrong[0]))} in the list is no name; synonyms are written 'mug|cup'")
    return [item if isinstance(item, str) else json.dumps(item) for item in found]


def _split(text: str) -> list[str]:
    """Entries between separators, without their quotes. Raises VocabularyError for a bracket or quote without its
    partner, and for a key of YAML or of a class list."""
    names, at = [], 0
    while at < len(text):
        match = _QUOTED.match(text, at)
        if match:
            names.append(_unquoted(match))
        else:
            match = _BARE.match(text, at)
            if match is None:  # it matches anything
                break
            names.append(_plain(match[1].strip()))
        at = match.end()
    return names


def _unquoted(match: re.Match[str]) -> str:
    if match["b"] is not None:
        return match["b"].replace("''", "'")
    return next(part for part in (match["a"], match["c"], match["d"]) if part is not None)


def _plain(name: str) -> str:
    """An entry without quotes around it, or VocabularyError."""
    if name[:1] in _QUOTES:
        raise VocabularyError(
            f"{_short(name)} begins with a quotation mark that is not closed at its end; {_WRITE}; quotes go around a "
            "whole entry"
        )
    if any(name.count(left) != name.count(right) for left, right in ("[]", "{}")):
        raise VocabularyError(f"{_short(name)} has a bracket without its partner; {_WRITE}")
    if name[:1] == "[" and name[1:].lstrip()[:1] in _QUOTES:
        raise VocabularyError(f"{_short(name)} is a list among names; {_WRITE}")
    if _BULLET.match(name):
        raise VocabularyError(f"{_short(name)} is a line of a list, and other lines are not; {_WRITE}")
    if _KEY.match(name):
        raise VocabularyError(f"{_short(name)} is a key and not a name; {_WRITE}")
    return name


def _short(text: str) -> str:
    # what is not printable is shown escaped
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
