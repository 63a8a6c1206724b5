"""Online sources: the policy samples, somebody judges, and what comes out is batches like any others."""
