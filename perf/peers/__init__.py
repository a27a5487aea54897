"""FedAvg in fedekd, in a bare loop and in other libraries, on the same data."""
