"""The engine of jobs. It knows no kind of job."""
