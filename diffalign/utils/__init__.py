"""Files, devices, processes, HTTP, memory: nothing of the domain."""
