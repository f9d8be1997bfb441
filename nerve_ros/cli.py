"""The `nerve` command: all of nerve_core's, and what needs a running node and ROS 2, imported when it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from nerve_core.cli.app import app, main
from nerve_core.cli.options import NAMES_HELP, AsJson, Device, Model, Overwrite, Precision, Preset, Set, load
from nerve_core.console import console, say, tell
from nerve_core.output import claim
from nerve_ros import signals

if TYPE_CHECKING:
    from nerve_core.replay.frames import Frame
    from nerve_core.segmenter import Segmentation

__all__ = ["app", "main"]

_MODEL, _DEVICE, _PRESET = "embedded", "auto", "pair"
_NODE_LOG = "node.log"


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
    from nerve_ros.watch.run import run

    run(namespace=namespace, host=host, port=port, save=save, every=every)


@app.command()
def locate(
    name: Annotated[str, typer.Argument(help='What to look for, in the vocabulary or not; synonyms as "mug|cup".')],
    namespace: Annotated[str, typer.Option(help="Namespace of the node to ask, as in --namespace /front.")] = "/",
    wait: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for the node, and again for its answer.")
    ] = 30.0,
    mask: Annotated[Path | None, typer.Option(help="Write its mask to this image file.")] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
) -> None:
    """Ask a running node where something is in its newest image. Ends with 1 where it is not found."""
    with signals.remembered() as came:
        try:
            _need_ros("nerve locate")
            from nerve_ros import locate as question

            if mask is not None:
                if not mask.absolute().parent.is_dir():
                    raise ValueError(f"{mask} cannot be written: there is no folder {mask.parent}")
                claim([mask], overwrite, "--mask")
            answer = question.ask(name, namespace=namespace, wait=wait, mask=mask, ended=came)
        except signals.Ended as ended:
            _end("nerve locate", ended)
    tell(question.as_json(answer) if as_json else question.as_text(answer))
    raise typer.Exit(0 if answer["found"] else 1)


@app.command()
def replay(
    bag: Annotated[Path, typer.Argument(help="A rosbag2 folder, or a .mcap, .db3 or (ROS 1) .bag file.")],
    image_topic: Annotated[
        list[str] | None,
        typer.Option(help="Topic of images; several times for several cameras. Not needed where there is only one."),
    ] = None,
    names: Annotated[str, typer.Option(help=NAMES_HELP)] = "",
    vocabulary_topic: Annotated[
        str | None, typer.Option(help="Take the names from this topic of the bag: Vocabulary, String or LabelInfo.")
    ] = None,
    labels_topic: Annotated[
        str | None, typer.Option(help="Topic of images of labels, to score the masks against (mIoU).")
    ] = None,
    label_info_topic: Annotated[
        str | None, typer.Option(help="Topic that tells the labels' names, where it is not beside the labels.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bag, the video and the report.")] = Path("nerve_replay"),
    limit: Annotated[int | None, typer.Option(min=1, help="Images of each camera, at most.")] = None,
    start: Annotated[float, typer.Option(min=0.0, help="Begin so many seconds after the bag does.")] = 0.0,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of the bag, from there; by default to its end.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Only every n-th image of each camera.")] = 1,
    with_bag: Annotated[bool, typer.Option("--bag/--no-bag", help="Write a bag of the masks.")] = True,
    with_video: Annotated[bool, typer.Option("--video/--no-video", help="Write a video of the overlays.")] = True,
    live: Annotated[
        bool, typer.Option("--live", help="Play to a running node first, time its masks and compare them.")
    ] = False,
    rate: Annotated[float, typer.Option(min=0.01, max=100.0, help="With --live: play so much faster.")] = 1.0,
    namespace: Annotated[str, typer.Option(help="With --live: the node's, as in --namespace /front.")] = "/",
    start_node: Annotated[
        bool, typer.Option("--start-node", help="With --live: start a node with these options, for the measurement.")
    ] = False,
    node_pid: Annotated[
        int, typer.Option(min=0, help="With --live: the process of the running node, to tell its CPU and memory.")
    ] = 0,
    model: Model = _MODEL,
    device: Device = _DEVICE,
    precision: Precision = None,
    preset: Preset = _PRESET,
    set_: Set = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Segment every image of a recording, without ROS: a bag of masks, a video, and a report of how steady they are.

    With --live it is played to a node over ROS 2 before, and what a robot would see is reported too; ends with 1 where
    a mask is not the one worked out offline. Ctrl-C ends the offline part in order: what is done until then is written,
    and the exit code is 130.
    """
    from nerve_core.replay.console import progress, show
    from nerve_core.replay.frames import Selection, choose_topics, read_vocabulary
    from nerve_core.replay.messages import COMPRESSED_IMAGE
    from nerve_core.replay.reading import Bag
    from nerve_core.replay.run import claim_results, with_live
    from nerve_core.replay.run import replay as run
    from nerve_core.report import write_report
    from nerve_core.text.parsing import read_names
    from nerve_core.text.vocabulary import Vocabulary

    if bool(names.strip()) == (vocabulary_topic is not None):
        raise ValueError('say what to look for by --names "ball, mug|cup", or by --vocabulary-topic; one of them')
    with Bag(bag) as opened:
        topics = choose_topics(opened, image_topic or [], labels_topic)
        selection = Selection(topics, start=start, duration=duration, every=every, limit=limit)
        if vocabulary_topic is None:
            vocabulary = Vocabulary(read_names(names))
        else:
            vocabulary = read_vocabulary(opened, vocabulary_topic)
        total, images = selection.count(opened), opened.images()
    claim_results(
        out,
        topics,
        bag=with_bag,
        video=with_video,
        scored=labels_topic is not None,
        log=_NODE_LOG if start_node else "",
        overwrite=overwrite,
    )
    if live:
        _need_ros("nerve replay --live")
        from nerve_ros import live as with_node

        chosen: dict[str, object] = {"model": model, "device": device}
        chosen |= {"precision": precision or "auto", "preset": preset}
        if set_:
            raise ValueError("--set is not for --live: the node goes by its own parameters")
        if not start_node and (model, device, precision, preset) != (_MODEL, _DEVICE, None, _PRESET):
            raise ValueError(
                "the running node has a model, a device, a precision and a preset: leave these options out"
            )
        compressed = any(topic.name == topics[0] and topic.kind == COMPRESSED_IMAGE for topic in images)
        chosen |= {"image_transport": "compressed" if compressed else "raw", "use_sim_time": True}
        rig = with_node.Rig(namespace, rate, node_pid, chosen if start_node else None)
        out.mkdir(parents=True, exist_ok=True)
        with console.status("") as status:
            try:
                with signals.raised():
                    played = with_node.play(bag, selection, vocabulary, rig, out / _NODE_LOG, status.update)
            except signals.Ended as ended:
                _end("nerve replay", ended)
            status.update("loading the node's model")
            segmenter = played.load()
        vocabulary, model = played.vocabulary(vocabulary), played.config.model
        comparison = with_node.Comparison(played, vocabulary)
    else:
        if start_node or node_pid or rate != 1.0 or namespace != "/":
            raise ValueError("--rate, --namespace, --start-node and --node-pid are for --live")
        segmenter = load(model, device, precision, preset, set_)

    def seen(frame: Frame, found: Segmentation) -> None:
        advance()
        if live:
            comparison.see(frame, found)

    with progress(console, total) as advance:
        replayed = run(
            bag,
            selection,
            segmenter,
            vocabulary,
            out,
            labels_topic=labels_topic,
            label_info_topic=label_info_topic,
            bag=with_bag,
            video=with_video,
            pair=model,
            seen=seen,
        )
    if live:
        replayed = with_live(replayed, (with_node.figures(played, comparison),))
    write_report(replayed.report, out)
    show(console, replayed, out)
    if as_json:
        print(json.dumps({"images": replayed.frames, "interrupted": replayed.interrupted, "out": str(out)}))
    unequal = live and (comparison.different or not comparison.compared)
    raise typer.Exit(130 if replayed.interrupted else 1 if unequal else 0)


def _end(command: str, ended: signals.Ended) -> NoReturn:
    """Say by which signal the command was ended, and end it with the exit code that says so too."""
    say(f"{command}: {ended}", style="yellow")
    raise typer.Exit(128 + ended.number)


def _need_ros(command: str) -> None:
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{command} needs ROS 2 ({error}); source its setup.bash, or here: . scripts/env.sh"
        ) from error


if __name__ == "__main__":
    main()
