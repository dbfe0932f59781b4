"""Chats, preference pairs and held-out questions about the languages of a corpus."""
