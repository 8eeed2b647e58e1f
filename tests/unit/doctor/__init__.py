"""Every check, on machines that were made up to fail it."""
