"""Floor 3: objectives, optimizers, schedules, precision, checkpoints, and the one loop that trains everything."""
