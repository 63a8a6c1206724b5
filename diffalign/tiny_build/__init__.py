"""Train the weights of the built-in tiny models; run ``python -m diffalign.tiny_build.build``."""
