"""Training of SPO's step-aware preference model: from preferences and a frozen diffusion model to a reward
that ``step_aware:FOLDER`` loads.
"""
