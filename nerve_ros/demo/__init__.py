"""Beside the way message -> ... -> message: the demonstration: a bag is played to the node, the answers measured.

One process plays (player), another is the node by its installed executable, a third starts both, listens and reports
(`python -m nerve_ros.demo`). Only its pictures know how the maths draws; nothing here knows how it computes.
"""
