"""The torch engine. `messages`, `sequence` and `scheduler` know no torch; the rest runs in workers."""
