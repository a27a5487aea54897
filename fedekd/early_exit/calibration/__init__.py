"""Calibration of exit thresholds: rules with a finite-sample guarantee, baselines without one, and their validity."""
