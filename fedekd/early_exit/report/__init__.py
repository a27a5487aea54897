"""Report of a calibrated early-exit network: tables, figures and pages."""
