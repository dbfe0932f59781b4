"""A model folder ready for the hub: the files, and a model card that is filled from the manifests."""
