"""What to know before a run starts: the learning rate, the memory."""
