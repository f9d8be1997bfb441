"""`nerve models`: which pairs there are, and fetching and checking their weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..console import PlainConsole, tell
from ..models.conversion import clear_converted, converted_bytes, converted_cache
from ..models.pairs import ModelPair, Source, find_pair, pair_names
from ..models.weights import FILES, Download, cached_folder, check_space, fetch, file_names, hub_cache, in_words, plan
from ..text.cache import EmbeddingCache, cache_folder

if TYPE_CHECKING:
    from ..models.verify import Finding

models = typer.Typer(no_args_is_help=True, help="Fetch and check the weights of model pairs.")

PAIR_HELP = "A pair's name, a folder with a pair.json, or CLIP+DIFFUSION, each a folder or a hub id (owner/name)."
Pair = Annotated[str, typer.Argument(help=PAIR_HELP)]
CacheDir = Annotated[Path | None, typer.Option(help="The hub's cache; by default HF_HUB_CACHE, or below HF_HOME.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


@models.command("list")
def list_pairs(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Show the pairs known by name, what they are made of, and what of them is here."""
    pairs = {name: _parts(find_pair(name), cache_dir) for name in pair_names()}
    if as_json:
        print(json.dumps({"pairs": pairs}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("pair", no_wrap=True)
    table.add_column("here", justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for name, parts in pairs.items():
        table.add_row(name, style="bold")
        for part in parts:
            here = "no" if part["bytes"] is None else in_words(part["bytes"])
            model = "comes with the package" if name == "embedded" else part["model"]
            optional = ", optional" if part["part"] == "taesd" else ""
            table.add_row(f"  {part['part']:<10} {model}{optional}", here, part["licence"] or "see its page")
    console = _console()
    console.print(table)
    console.print("\nFetch one with: nerve models pull PAIR")


@models.command()
def pull(
    pair: Pair,
    full_precision: Annotated[
        bool, typer.Option("--full-precision", help="Fetch 32-bit weights where 16-bit ones would do; twice the size.")
    ] = False,
    taesd: Annotated[bool, typer.Option("--taesd", help="Also fetch the optional tiny VAE encoder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and stop.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Fetch a pair's weights from the hub into its cache: only what is used, sizes said first.

    Safetensors are taken where a model has them. Where it is published as a pickle alone, its tensors are read once, by
    PyTorch's restricted unpickler in a process of its own, and kept as safetensors in a cache of ours.

    What is whole in the cache is kept, so that after an interruption the same command goes on. A token, a mirror and
    the cache are the hub's own settings: HF_TOKEN or hf auth login, HF_ENDPOINT, HF_HUB_CACHE.
    """
    console = _console()
    found = find_pair(pair)
    downloads: dict[str, Download] = {}
    for part, source in found.sources.items():
        if part == "taesd" and not taesd and found.settings.get("encoder") != "taesd":
            continue
        if source.on_hub:
            with console.status(f"asking for {source}"):
                downloads[part] = plan(source, FILES[part], cache_dir=_text(cache_dir), half=not full_precision)
        else:
            console.print(f"{part} is the folder {source.location}: nothing to fetch", soft_wrap=True)
    if not downloads:
        return
    console.print(_plan_table(downloads))
    total = sum(download.bytes_absent for download in downloads.values())
    check_space(list(downloads.values()))
    amount = f"{in_words(total)} to fetch into" if total else "nothing to fetch: all is in"
    console.print(f"{amount} {hub_cache(cache_dir)}", soft_wrap=True)
    pickled = [download for download in downloads.values() if download.pickles]
    for download in pickled:
        console.print(
            f"{download.source} is published as a pickle alone: {in_words(download.bytes_converted)} are converted to "
            f"safetensors into {converted_cache()}, in a process of its own; what is fetched of the pickle goes again",
            soft_wrap=True,
        )
    if dry_run:
        return
    for download in downloads.values():
        fetch(download)
    if pickled and _show(_check(pair, cache_dir), only_faults=True):
        raise typer.Exit(1)
    console.print(f"{found.name} is whole; check it with: nerve models verify {pair}", soft_wrap=True)


@models.command()
def verify(
    pair: Annotated[str, typer.Argument(help=f"{PAIR_HELP} Or a folder that is a CLIP or a diffusion model.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also read every weight: none may be infinite or NaN.")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Check that a pair's files are what its networks need; exit code 1 if not. Nothing is fetched."""
    findings = _check(pair, cache_dir, deep=deep)
    faults = sum(finding.kind == "fault" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not faults, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        _show(findings)
        _console().print(f"{faults} faults" if faults else f"{pair} is whole and fits together")
    if faults:
        raise typer.Exit(1)


@models.command()
def path(
    pair: Annotated[str | None, typer.Argument(help=PAIR_HELP)] = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Print the folders in use: the hub's cache, that of text embeddings and of converted weights, those of a pair."""
    folders: dict[str, str | None] = {
        "hub cache": str(hub_cache(cache_dir)),
        "text cache": str(cache_folder()),
        "converted": str(converted_cache()),
    }
    if pair is not None:
        for part, source in find_pair(pair).sources.items():
            folder = _folder(part, source, cache_dir)
            folders[part] = None if folder is None else str(folder)
    if as_json:
        print(json.dumps(folders))
        return
    for name, place in folders.items():
        tell(f"{name:<12}{place or 'not in the cache: nerve models pull ' + str(pair)}")


@models.command("clear-cache")
def clear_cache(
    converted: Annotated[
        bool, typer.Option("--converted", help="Also remove the weights that were converted from pickles.")
    ] = False,
) -> None:
    """Empty the cache of text embeddings; weights stay (hf cache removes the hub's, --converted those made here)."""
    folder = cache_folder()
    freed = EmbeddingCache(folder).clear()
    if converted:
        freed += clear_converted()
    _console().print(f"{in_words(freed)} freed in {folder}", soft_wrap=True)
    if kept := converted_bytes():
        said = f"{in_words(kept)} of converted weights stay in {converted_cache()}; --converted removes them"
        _console().print(said, soft_wrap=True)


def _check(pair: str, cache_dir: Path | None, *, deep: bool = False) -> list[Finding]:
    """What `models.verify` finds."""
    from ..models.loading import quiet_libraries
    from ..models.verify import verify as check  # imports the model libraries, which takes seconds

    quiet_libraries()
    return check(pair, cache_dir=_text(cache_dir), deep=deep)


def _show(findings: list[Finding], *, only_faults: bool = False) -> bool:
    """Print findings, all or the faults; returns whether there is a fault."""
    console = _console()
    marks = {"fact": Text("ok", "green"), "note": Text("note", "yellow"), "fault": Text("fault", "bold red")}
    for finding in findings:
        if only_faults and finding.kind != "fault":
            continue
        console.print(marks[finding.kind], end="  " + " " * (5 - len(finding.kind.replace("fact", "ok"))))
        console.print(f"{finding.place}: {finding.text}", soft_wrap=True)
    return any(finding.kind == "fault" for finding in findings)


def _console() -> PlainConsole:
    """Standard output as it is now: what these commands print is their result."""
    return PlainConsole()


def _text(folder: Path | None) -> str | None:
    return None if folder is None else str(folder.expanduser())


def _folder(part: str, source: Source, cache_dir: Path | None) -> Path | None:
    """A source's folder if it is here, whole."""
    if source.on_hub:
        return cached_folder(source, FILES[part], _text(cache_dir))
    return Path(source.location) if Path(source.location).is_dir() else None


def _parts(pair: ModelPair, cache_dir: Path | None) -> list[dict[str, Any]]:
    """What a pair is made of, as plain values; bytes: of the files that are used, None where they are not here."""
    parts = []
    for part, source in pair.sources.items():
        folder = _folder(part, source, cache_dir)
        size = None
        if folder is not None:
            used = FILES[part].choose(file_names(folder), half=True)
            size = sum((folder / name).stat().st_size for name in used)
        parts.append({"part": part, "model": str(source), "licence": source.licence, "bytes": size})
    return parts


def _plan_table(downloads: dict[str, Download]) -> Table:
    """Every file that is used, its size, and whether it is here."""
    table = Table()
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("")
    for part, download in downloads.items():
        absent = {file.name for file in download.absent}
        table.add_row(Text(f"{part}: {download.source}", "bold"), in_words(sum(f.size for f in download.files)), "")
        pickled = {name for names in download.pickles.values() for name in names}
        for file in download.files:
            state = "fetch" if file.name in absent else "here"
            table.add_row(f"  {file.name}", in_words(file.size), f"{state}, convert" if file.name in pickled else state)
        table.add_section()
    return table
