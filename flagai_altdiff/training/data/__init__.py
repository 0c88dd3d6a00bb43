"""Training data: what lies on a disk or a server becomes numbered examples, and these the batches of every process."""
