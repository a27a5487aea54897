"""FedAvg in fedekd, in a bare loop and in other libraries, with equal work."""
