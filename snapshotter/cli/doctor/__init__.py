"""`doctor`: looks at everything that a node needs, and says what to change. See `command`."""
