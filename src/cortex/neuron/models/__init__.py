"""Model families, one file each, over the layers of `cortex.neuron.nn`."""
