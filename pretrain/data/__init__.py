"""Documents to training rows: reading, splitting, encoding, packing, mixing."""
