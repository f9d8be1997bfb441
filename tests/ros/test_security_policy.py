"""The shipped SROS 2 policy names what the node does on the network, exactly; and the node needs to write no folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from ament_index_python.packages import get_package_prefix, get_package_share_directory

import harness
import nerve_core

POLICY = Path(get_package_share_directory("nerve_ros")) / "config" / "sros2" / "nerve.policy.xml"
NAMESPACE = "/robot"
SERVERS = ("publish", "subscribe", "reply", "request")


def enclaves() -> dict[str, ET.Element]:
    return {one.get("path"): one.find("profiles/profile") for one in ET.parse(POLICY).findall("enclaves/enclave")}


def allowed(profile: ET.Element, namespace: str) -> dict[str, set[str]]:
    """What a profile allows (publish, subscribe, reply, request): names in full, as sros2 makes them."""
    node = profile.get("node")
    base = namespace.rstrip("/")
    found: dict[str, set[str]] = {rule: set() for rule in SERVERS}
    for rules in profile:
        for rule, qualifier in rules.attrib.items():
            assert qualifier == "ALLOW"
            for entry in rules:
                name = entry.text.replace("~", f"{base}/{node}", 1) if entry.text.startswith("~") else entry.text
                name = name if name.startswith("/") else f"{base}/{name}"
                assert name not in found[rule], f"{name} is allowed twice"
                found[rule].add(name)
    return found


@pytest.fixture(scope="module")
def asking(environment):
    peer = harness.Peer(environment, "asking")
    yield peer
    peer.end()


def names_on_the_network(peer: harness.Peer) -> dict[str, set[str]]:
    graph = peer.do("graph", node="nerve", namespace=NAMESPACE)
    assert graph["clients"] == {}
    return {
        "publish": set(graph["publishers"]),
        "subscribe": set(graph["subscriptions"]),
        "reply": set(graph["services"]),
        "request": set(),
    }


def test_the_policy_is_the_running_nodes_names_exactly(environment, asking):
    policy = allowed(enclaves()["/nerve"], NAMESPACE)
    maps = {name for name in policy["publish"] if "*" in name}
    assert len(maps) == 1
    arguments = ["-r", f"__ns:={NAMESPACE}", "--log-level", "rcl:=error"]
    settings = {"vocabulary": ["ball"], "confidence_classes": ["ball"], "use_depth": True, "use_sim_time": True}
    node = harness.Node(environment, arguments=arguments, **settings)
    try:
        node.wait_active()
        asking.do("target", node=f"{NAMESPACE}/nerve")
        seen: dict[str, set[str]] = {rule: set() for rule in SERVERS}
        shown: dict[str, set[str]] = {}

        def look_until(complete) -> None:
            """Discovery takes its time: look until everything is there, or until it might as well have been."""
            deadline = time.monotonic() + harness.PATIENCE
            while True:
                for rule, names in names_on_the_network(asking).items():
                    seen[rule] |= names
                (pattern,) = maps
                slugs = {name for name in seen["publish"] if name.startswith(pattern[:-1])}
                shown.update(seen, publish=(seen["publish"] - slugs) | ({pattern} if slugs else set()))
                if complete() or time.monotonic() > deadline:
                    return

        compressed = f"{NAMESPACE}/image/compressed"
        look_until(lambda: shown == policy | {"subscribe": policy["subscribe"] - {compressed}})
        for label in ("deactivate", "cleanup"):
            assert asking.do("transition", label=label)["success"]
        assert asking.do("set_parameter", name="image_transport", value="compressed")["successful"]
        for label in ("configure", "activate"):
            assert asking.do("transition", label=label)["success"]
        look_until(lambda: shown == policy)
        assert shown == policy
    finally:
        node.end()


OWN = re.compile("parameter|type_description")
"""Services that every node has; one that may not serve them does not start."""


def test_the_examples_ask_for_nothing_that_the_node_does_not_have():
    profiles = {path: allowed(profile, "/") for path, profile in enclaves().items()}
    node = profiles.pop("/nerve")
    anybodys = {"/parameter_events", "/rosout"}
    own = {name for name in node["reply"] if OWN.search(name)}
    assert len(own) == 7
    assert profiles
    for path, other in profiles.items():
        assert other["publish"] - anybodys <= node["subscribe"], path
        assert other["subscribe"] - anybodys <= node["publish"], path
        assert other["request"] <= node["reply"], path
        assert other["reply"] == {name.replace("/nerve/", f"{path}/") for name in own}, path
        assert not any(re.search("parameters|change_state", name) for name in other["request"]), path


def test_sros2_finds_enclaves_alone_where_it_looks_for_them():
    # It takes whatever stands there for an enclave, comments too, and stops.
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    inside = list(ET.parse(POLICY, parser).find("enclaves"))
    assert [one.tag for one in inside] == ["enclave"] * len(inside)


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
AS_ANYBODY = f"""
import ctypes, os, sys
for capability in {CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH}:
    ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, capability)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command for which, as root too, a folder that may not be written is one."""


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    found = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def writable(path: Path) -> bool:
    test = f"import os, sys; sys.exit(not os.access({str(path)!r}, os.W_OK))"
    return os.spawnl(os.P_WAIT, sys.executable, "python", "-c", AS_ANYBODY, sys.executable, "-c", test) == 0


class Restricted(harness.Node):
    """The node, without root's leave to write everywhere."""

    def __init__(self, env, **parameters):
        executable = Path(get_package_prefix("nerve_ros")) / "lib" / "nerve_ros" / "nerve_node"
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={value}")]
        command = [sys.executable, "-c", AS_ANYBODY, str(executable), "--ros-args", *given]
        harness.Process.__init__(self, command, env)


def test_the_node_runs_with_a_model_folder_and_a_cache_that_it_may_not_write(environment, new_peer, tmp_path):
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(Path(nerve_core.__file__).parent / "embedded", model)
    cache.mkdir()
    everything = [model, cache, *(path for path in model.rglob("*") if path.is_dir())]
    try:
        for path in everything:
            path.chmod(0o500)
        if writable(model):
            pytest.skip("this user may write anywhere, and cannot give that up")
        before = contents(model, cache)
        node = Restricted(environment, vocabulary="[ball]", model=model, cache_dir=cache, offline="true")
        try:
            node.wait_active()
            node.wait_log("text embeddings are not kept")
            peer = new_peer("camera")
            peer.do("subscribe", kind="mask")
            peer.do("advertise", topic="image")
            peer.do("stream", picture={"width": 96, "height": 64}, rate=10.0)
            peer.wait("mask")
        finally:
            node.end()
        assert contents(model, cache) == before
    finally:
        for path in everything:
            path.chmod(0o700)
