"""The command `nerve watch`: what it refuses, and what it says then."""

import subprocess
import sys

import harness
from watching import command


def refused(environment, *arguments):
    """What the command says, on one line, where it will not start."""
    done = subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, timeout=harness.LOADING, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr.strip()


def test_a_port_in_use_is_told_in_a_sentence(environment, page):
    port = page.server_address[1]
    said = refused(environment, "--port", str(port))
    assert said == f"nerve: port {port} of 127.0.0.1 is in use; give another with --port, or --port 0"


def test_a_bad_namespace_is_told_in_a_sentence(environment):
    said = refused(environment, "--namespace", "front left", "--port", "0")
    assert said.startswith("nerve: --namespace '/front left' cannot be used, it is written like /front/left: ")


def test_without_ros_the_other_commands_work_and_this_one_says_what_it_needs():
    """On a machine where `pip install .` brought nerve_ros without ROS."""
    code = (
        "import sys\n"
        "class NoRos:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('rclpy', 'sensor_msgs', 'cv_bridge'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, NoRos())\n"
        "from nerve_ros.cli import main\n"
        "main()\n"
    )

    def nerve(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=harness.LOADING,
            check=False,
        )

    assert "embedded" in nerve("models", "list").stdout
    done = nerve("watch")
    assert done.returncode == 2
    assert "nerve watch needs ROS 2 (No module named 'rclpy')" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
