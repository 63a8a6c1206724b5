"""Online sources: the policy samples, rewards or people judge, and the result is batches."""
