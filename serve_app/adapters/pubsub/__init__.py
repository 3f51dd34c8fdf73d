"""Messages: Google Cloud Pub/Sub, the embedded server that speaks its protocol, and queues in memory."""
