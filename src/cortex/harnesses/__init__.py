"""Built-in plugins, registered exactly as a stranger's are."""
