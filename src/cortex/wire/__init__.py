"""What crosses a socket: typed messages, errors and event framing. No I/O, nothing else of cortex."""
