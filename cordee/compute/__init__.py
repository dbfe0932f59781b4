"""The one place where the rooms share torch code."""
