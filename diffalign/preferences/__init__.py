"""Making preferences: pairs and lists from scores, labels of segments, two takes of a video."""
