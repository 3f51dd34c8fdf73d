"""Pictures from prompts: a kind of job."""
