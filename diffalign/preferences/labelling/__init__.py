"""Human labels in a browser: comparison tasks, the store of answers, and the page's server."""
