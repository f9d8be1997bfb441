"""Benchmarks: what this project does, timed together with plain versions of what others do.

Installed as `nerve_benchmarks`; `nerve bench` runs it.
"""
