"""What comes out of a run: an aligned pipeline that plain diffusers loads, merged weights, a model card."""
