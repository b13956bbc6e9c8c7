"""cortex, the gateway: knows the fleet, routes, translates, measures."""
