"""Edits: the first kind of job."""
