"""What a trained network with exits is worth: calibrated, against its cost, and where its promise ends."""
