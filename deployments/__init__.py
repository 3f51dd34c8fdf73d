"""What runs on Ray: the Serve deployments, the composition root, and the command line."""
