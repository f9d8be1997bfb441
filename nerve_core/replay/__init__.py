"""A recording, segmented frame by frame without ROS: bag -> frames -> masks -> bag, video, measures."""
