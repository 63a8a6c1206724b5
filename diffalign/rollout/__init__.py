"""Online sources: the policy draws samples, rewards or people score them, and batches are made of both."""
