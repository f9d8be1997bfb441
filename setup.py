"""Says which packages `pip install .` installs; everything else is said in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["nerve_core", "nerve_core.*", "nerve_ros", "nerve_ros.*"]),
        "nerve_benchmarks",
        "nerve_core.replay.msg",  # the definitions of the messages that nerve_core writes into bags
    ],
    package_dir={"nerve_benchmarks": "benchmarks", "nerve_core.replay.msg": "msg"},
)
