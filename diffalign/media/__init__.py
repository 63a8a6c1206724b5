"""Images and videos: decoding, encoding, frames."""
