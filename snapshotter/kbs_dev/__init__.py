"""A key broker service for development and tests: the protocol is real, the trust is not."""
