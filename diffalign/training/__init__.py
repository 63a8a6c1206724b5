"""The training loop, which is independent of methods, models and data.

Its interface to them is ``step = method(policy, reference, batch, generator)``.

``loop.train`` is the loop; ``hooks`` log, checkpoint and validate; ``checkpoint``, ``metrics``, ``guard``,
``ema``, ``optimizers`` and ``diagnostics`` are its parts. Only this package imports accelerate's training
functions.
"""
