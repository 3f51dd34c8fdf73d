"""Audits: a matrix of cells on one session, painted, measured and compared. Knows no Ray."""
