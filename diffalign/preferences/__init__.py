"""Make preference data: pairs and lists from scores, human labels, segment labels, takes of a video."""
