"""Measurements: engine, serving, audit."""
