"""Images and the networks' results for some of them in; a mask for every image out, carried along the optical flow.

Terms: a keyframe is an image that the networks saw; a carried mask is a keyframe's mask moved to a later image;
coverage is the share of pixels that the map from the newest image reaches in its keyframe.
"""
