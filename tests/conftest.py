"""For every test: an interrupt reaches the processes that tests start, and no console has a width before its test."""

import os
import signal

# A shell has what it starts in the background ignore SIGINT, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest-xdist sets it in its processes, and rich keeps what it finds when a console is made.
os.environ.pop("COLUMNS", None)
