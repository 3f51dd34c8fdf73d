"""The HTTP routes. They know no store and no Ray."""
