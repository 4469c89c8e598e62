"""Training steps of other libraries, or written plainly, to be timed in turn with ours on the same towers."""
