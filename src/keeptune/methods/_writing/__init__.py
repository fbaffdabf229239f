"""Rows that a model writes itself: sampling, the form of a whole row, chats, rewritten answers."""
