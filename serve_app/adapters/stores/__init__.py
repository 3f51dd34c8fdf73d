"""Job stores, cancellations and session documents with them."""
