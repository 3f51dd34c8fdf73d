"""flux-fill-serve: takes things out of photos. This package is the application and knows nothing of Ray."""
