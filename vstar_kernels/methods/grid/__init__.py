"""ETC: a video as one grid image, temporal attention from spatial attention."""
