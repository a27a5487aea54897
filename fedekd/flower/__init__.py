"""A federation of real sites, on Flower: needs `fedekd[flower]`. `apps` holds what its runtime starts."""
