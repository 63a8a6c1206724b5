"""Score files and table rows with rewards; cache the scores."""
