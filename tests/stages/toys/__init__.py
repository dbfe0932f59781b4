"""A user's own stages, as small as can be."""
