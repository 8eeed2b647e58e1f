"""State as releases have left it, which every later program opens."""
