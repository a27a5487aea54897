"""Report of a network with early exits: tables, figures and pages."""
