"""Training: data, loss, optimisation and measurement of small SmolVLMs."""
