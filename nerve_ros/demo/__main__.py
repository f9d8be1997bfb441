"""The command `python -m nerve_ros.demo`, which `scripts/demo` runs."""

import signal

# Nothing has been started yet: during the imports, which take seconds, an interrupt just ends this process.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer  # noqa: E402

from nerve_ros.demo.run import main  # noqa: E402

typer.run(main)
