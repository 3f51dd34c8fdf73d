"""LoRAs: files checked and read, and painted with. `apart` imports no torch."""
