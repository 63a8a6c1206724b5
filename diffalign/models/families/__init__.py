"""Model families, one a file: prompt encoding, network call, codec, sampling times."""
