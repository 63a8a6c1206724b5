"""The training loop, which knows neither methods, models nor data.

``step = method(policy, reference, batch, generator)`` is all that it asks of them.

``loop.train`` runs it; ``hooks`` log, checkpoint and validate; ``checkpoint``, ``metrics``, ``guard``,
``ema``, ``optimizers`` and ``diagnostics`` are what it is made of. This package alone imports accelerate's
training machinery.
"""
