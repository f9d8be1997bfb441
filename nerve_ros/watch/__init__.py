"""`nerve watch`: what a running node publishes, as a page for browsers and a table in the terminal.

:class:`watcher.Watcher` subscribes, :class:`board.Board` holds the newest of everything, :class:`page.Page` shows it to
browsers and :func:`terminal.table` in the terminal. All text on the board comes from the network: it is shortened and
made printable on its way in, the page sets it as text and never as HTML, and the terminal gets no escape sequence.
"""
