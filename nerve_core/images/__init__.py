"""Image buffers in, RGB arrays out; labels in, pictures to look at out."""
