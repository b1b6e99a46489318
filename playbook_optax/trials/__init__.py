"""Floor 2: what a user brings (`workload`) and the training of one trial (`train`)."""
