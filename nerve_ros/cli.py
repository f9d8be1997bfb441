"""The `nerve` command: all of nerve_core's, and what needs a running node and ROS 2, imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nerve_core.cli import app, main

__all__ = ["app", "main"]


@app.command()
def watch(
    namespace: Annotated[str, typer.Option(help="Namespace of the node to watch, as in --namespace /front.")] = "/",
    host: Annotated[str, typer.Option(help="Address the page is served on; 0.0.0.0 shows it to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes any free one.")] = 8090,
    save: Annotated[Path | None, typer.Option(help="Keep pictures in this folder.")] = None,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds between two pictures that --save keeps.")] = 1.0,
) -> None:
    """Show what a running node sees: a page for the browser, and a table in the terminal. Ends with Ctrl-C."""
    _need_ros("nerve watch")
    from nerve_ros.watch import run

    run(namespace=namespace, host=host, port=port, save=save, every=every)


@app.command()
def locate(
    name: Annotated[str, typer.Argument(help='What to look for, in the vocabulary or not; synonyms as "mug|cup".')],
    namespace: Annotated[str, typer.Option(help="Namespace of the node to ask, as in --namespace /front.")] = "/",
    wait: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for the node, and again for its answer.")
    ] = 30.0,
    mask: Annotated[Path | None, typer.Option(help="Write its mask to this image file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
) -> None:
    """Ask a running node where something is in its newest image. Ends with 1 where it is not found."""
    _need_ros("nerve locate")
    from nerve_ros import locate as question

    answer = question.ask(name, namespace=namespace, wait=wait, mask=mask)
    typer.echo(question.as_json(answer) if as_json else question.as_text(answer))
    raise typer.Exit(0 if answer["found"] else 1)


def _need_ros(command: str) -> None:
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{command} needs ROS 2 ({error}); source its setup.bash, or here: . scripts/env.sh"
        ) from error


if __name__ == "__main__":
    main()
