"""A recorded bag in; a bag of masks, videos and measures out: segmentation of a recording without ROS."""
