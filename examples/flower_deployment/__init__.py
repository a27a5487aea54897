"""A federation of sites on one machine, with TLS and keys: `make sites`."""
