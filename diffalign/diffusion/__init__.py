"""The mathematics of diffusion and flow models: paths, times, noising, samplers, likelihood, inversion."""
