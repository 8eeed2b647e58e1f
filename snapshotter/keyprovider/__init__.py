"""The other side of the ocicrypt key provider protocol: layer keys wrapped and unwrapped for other people's tools."""
