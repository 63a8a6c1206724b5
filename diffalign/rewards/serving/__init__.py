"""The server and the client of rewards over HTTP."""
