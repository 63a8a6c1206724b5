"""The results of a run: an aligned pipeline that plain diffusers loads, merged weights, a model card."""
