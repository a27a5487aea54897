"""Speed of fedekd, compared with a hand-written loop and a typical script."""
