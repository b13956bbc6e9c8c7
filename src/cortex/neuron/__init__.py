"""neuron: the daemon of one node. Owns the hardware, loads models, runs them."""
