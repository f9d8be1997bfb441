"""Lets `pip install .` work without colcon; what it installs is said in pyproject.toml."""

from setuptools import setup

setup()
