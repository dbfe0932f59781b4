"""What the stages that train with TRL share: the skeleton, its settings, adapters, checks of the batches."""
