"""Post-training: chats, supervised fine-tuning, preferences, adapters."""
