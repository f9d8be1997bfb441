"""For every test: an interrupt reaches the processes that tests start."""

import signal

# A shell has what it starts in the background ignore SIGINT, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
