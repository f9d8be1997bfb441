"""The demonstration behind `scripts/demo`: a bag is played to the node, and its answers are measured and drawn.

One process plays (player), another is the node by its installed executable, a third starts both, listens and reports
(`python -m nerve_ros.demo`). Of nerve_core it uses drawing, metric and bag reader, nothing that segments.
"""
