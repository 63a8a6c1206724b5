"""Benchmarks: measurements of the package, each with its rows on disk and a page."""

from diffalign.utils.notices import silence_packages

silence_packages()
