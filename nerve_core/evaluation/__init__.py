"""How good the masks are: the metric and the protocols."""
