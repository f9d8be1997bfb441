"""Where the figures come from: what this project does, timed beside plain versions of what others do.

Installed as `nerve_benchmarks`; `nerve bench` runs it.
"""
