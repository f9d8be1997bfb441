"""Labelled images and variants of the method in, scores out: data sets, metric, workers, the paper's tables, tuning."""
