"""Level and power of the exact tests of `do_no_harm`."""
