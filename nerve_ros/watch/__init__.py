"""`nerve watch`: what a running node publishes, as a page for browsers and a table in the terminal."""
