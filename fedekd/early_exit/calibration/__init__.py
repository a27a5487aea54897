"""Calibration of exit thresholds, with and without a finite-sample guarantee."""
