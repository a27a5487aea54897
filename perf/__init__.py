"""How fast fedekd is, beside the best loop that can be written by hand and beside a script as they are found."""
