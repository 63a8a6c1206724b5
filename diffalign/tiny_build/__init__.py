"""Training of the embedded worlds' weights; ``python -m diffalign.tiny_build.build`` makes them."""
