"""The room of alignment: chats, supervised fine-tuning, preferences, adapters."""
